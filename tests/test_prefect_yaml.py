"""`finercut deploy` on what prefect.yaml may be, on a real Prefect server; no run is started."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import ROOT
from click.testing import CliRunner
from prefect.client.orchestration import get_client

from finercut.system import yaml_files
from pipelines import deployment
from pipelines.cli import main

DOCUMENT = yaml_files.read(ROOT / "prefect.yaml", version="1.1")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())


def write(*deployments):
    document = copy.deepcopy(DOCUMENT) | {"deployments": list(deployments)}
    Path("prefect.yaml").write_text(yaml_files.dump(document, version="1.1"))


def nightly(**changes):
    """The deployment of ours under another name, without what is `...`."""
    changed = copy.deepcopy(DOCUMENT["deployments"][0]) | changes
    return {key: value for key, value in changed.items() if value is not ...}


OPTIONAL = ("description", "entrypoint", "parameters", "schedules", "concurrency_limit", "work_pool")


def test_everything_but_the_name_can_be_left_out_or_empty(here, prefect_server, monkeypatch):
    for variable, value in (("ACCELERATOR", "from-environment"), ("NAME", "templated"), ("POOL", "other")):
        monkeypatch.setenv(variable, value)
    nulls = {"accelerator": None, "pull": None, "params_file": "params.yaml", "overrides": {"search.exclude": None}}
    pool = {"name": "{{ $POOL }}"}
    due = {"cron": "0 3 * * *", "parameters": {"accelerator": "of-schedule"}}
    write(
        {"name": "bare"},
        nightly(name="empty", **dict.fromkeys(OPTIONAL)),
        nightly(name="some", parameters=nulls, schedules=[due]),
        nightly(name="{{ $NAME }}", parameters={"accelerator": "{{ $ACCELERATOR }}"}, work_pool=pool),
        nightly(name="nulls", schedules=[due | {"parameters": None, "slug": None}], work_pool={"name": None}),
    )
    said = CliRunner().invoke(main, ["deploy"])
    assert said.exit_code == 0, said.stderr
    assert "accelerator  of-schedule, one run at a time\n" in said.stdout
    with get_client(sync_client=True) as client:
        pools = {}
        for name in ("bare", "empty", "some", "templated", "nulls"):
            deployment = client.read_deployment_by_name(f"finercut/{name}")
            pools[name] = deployment.work_pool_name
            assert deployment.entrypoint == "pipelines.flow.compress"
        assert pools == dict.fromkeys(pools, "finercut") | {"templated": "other"}
        some = client.read_deployment_by_name("finercut/some")
        assert some.parameters == {name: value for name, value in nulls.items() if name != "pull"}
        for limit in ("of-schedule", "from-environment"):
            assert client.read_global_concurrency_limit_by_name(limit).limit == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no prefect.yaml here; run from the project's root"),
        ("", "prefect.yaml: `deployments` is no list of deployments; give at least one"),
        ("[1]", "prefect.yaml: `deployments` is no list of deployments; give at least one"),
        ("deployments:", "prefect.yaml: `deployments` is no list of deployments; give at least one"),
        ("deployments: {a: 1}", "prefect.yaml: `deployments` is no list of deployments; give at least one"),
        ("deployments: [nightly]", "prefect.yaml: deployment 1 is no mapping"),
        ("deployments: [{name: a}, {parameters: {}}]", "prefect.yaml: deployment 2 has no name"),
        ("deployments: [{name: a, parameters: [1]}]", "prefect.yaml: deployment a: parameters is no mapping"),
        ("deployments: [{name: a, work_pool: b}]", "prefect.yaml: deployment a: work_pool is no mapping"),
        (
            "deployments: [{name: a, work_pool: {name: [b]}}]",
            "prefect.yaml: deployment a: work_pool has a name that is no text",
        ),
        ("deployments: [{name: '{{ $NOWHERE }}'}]", "prefect.yaml: {{ $NOWHERE }} is not set in this environment"),
        ("deployments: [{name: a, schedules: {cron: x}}]", "prefect.yaml: deployment a: schedules is no list"),
        ("deployments: [{name: a, schedules: [x]}]", "prefect.yaml: deployment a: schedule is no mapping"),
        (
            "deployments: [{name: a, name: b}]",
            "prefect.yaml:1: name is there twice in one section; remove one of the two",
        ),
        ("deployments: [", "prefect.yaml:1 is not YAML: *"),
        ("deployments: [{name: a, parameters: {1: 2}}]", "prefect.yaml: deployment a: no parameter 1; there are *"),
        (
            "deployments: [{name: a, parameters: {pull: 'yes'}}]",
            "prefect.yaml: deployment a: parameter pull: 'yes' is not of type 'boolean'",
        ),
        (
            "deployments: [{name: a, parameters: {params_file: other.yaml}}]",
            "prefect.yaml: deployment a: parameter params_file: 'other.yaml' is not *",
        ),
        ("deployments: [{name: a}, {name: a}]", "prefect.yaml: two deployments are called a; rename one"),
        (
            "deployments: [{name: a, schedules: [{cron: 61 * * * *}]}]",
            'prefect.yaml: deployment a: schedule: cron: Invalid cron string: "61 * * * *"',
        ),
        (
            "deployments: [{name: a, schedules: [{cron: 0 2 * * *, timezone: Mars/Olympus}]}]",
            'prefect.yaml: deployment a: schedule: Invalid timezone: "Mars/Olympus" *',
        ),
        (
            "deployments: [{name: a, schedules: [{cron: 0 2 * * *, time_zone: UTC}]}]",
            "prefect.yaml: deployment a: schedule: a schedule by cron has no time_zone",
        ),
        (
            "deployments: [{name: a, schedules: [{interval: 3600, anchor_date: nonsense}]}]",
            "prefect.yaml: deployment a: schedule: anchor_date: *",
        ),
        (
            "deployments: [{name: a, schedules: [{cron: 0 2 * * *, day_or: x}]}]",
            "prefect.yaml: deployment a: schedule: day_or: Input should be a valid boolean*",
        ),
        (
            "deployments: [{name: a, schedules: [{interval: 0}]}]",
            "prefect.yaml: deployment a: schedule: interval: interval must be positive",
        ),
        ("deployments: [{name: a/b}]", "prefect.yaml: deployment a/b: name: *"),
        ("deployments: [{name: a, tags: gpu}]", "prefect.yaml: deployment a: tags: Input should be a valid list*"),
        ("deployments: [{name: a, shedules: []}]", "prefect.yaml: deployment a: a deployment has no shedules; *"),
        ("deployments: [{name: a, work_pool: {name: a/b}}]", "prefect.yaml: deployment a: work_pool: name: *"),
        (
            "deployments: [{name: a, concurrency_limit: {limit: 1, collision_strategy: QUEUE}}]",
            "prefect.yaml: deployment a: concurrency_limit: collision_strategy: Input should be 'ENQUEUE' or *",
        ),
        (
            "deployments: [{name: a, concurrency_limit: 0}]",
            "prefect.yaml: deployment a: concurrency_limit: no run could begin with 0",
        ),
        (
            "deployments: [{name: a, parameters: {accelerator: gpu/0}}]",
            "prefect.yaml: deployment a: parameter accelerator: name: *",
        ),
        (
            "deployments: [{name: a, parameters: {overrides: {a.b: 1}}}]",
            "prefect.yaml: deployment a: overrides need a params_file to start from",
        ),
        (
            "deployments: [{name: a, parameters: {budgets: [0.1, 0.1]}}]",
            "prefect.yaml: deployment a: the frontier's budgets 0.1, 0.1 name one twice",
        ),
        (
            "deployments: [{name: a, schedules: [{cron: 0 2 * * *, slug: x}, {cron: 0 3 * * *, slug: x}]}]",
            "prefect.yaml: deployment a: two schedules have the slug x; rename one",
        ),
        (
            "deployments: [{name: a, schedules: [{cron: 0 2 30 2 *}]}]",
            "prefect.yaml: deployment a: schedule: cron 0 2 30 2 * is never due; correct it, or set active: false",
        ),
        (
            "deployments: [{name: a, schedules: [{cron: 0 0 2 * * *}]}]",
            "prefect.yaml: deployment a: schedule: cron 0 0 2 * * * is due at *",
        ),
        (
            "deployments: [{name: a, schedules: [{rrule: FREQ=HOURLY;UNTIL=20200101T000000Z}]}]",
            "prefect.yaml: deployment a: schedule: rrule FREQ=HOURLY;UNTIL=20200101T000000Z is never due; *",
        ),
        (
            """deployments: [{name: a, schedules: [{rrule: '{"rrule": "FREQ=DAILY", "timezone": "Mars"}'}]}]""",
            "prefect.yaml: deployment a: schedule: timezone: *",
        ),
        ("deployments: [{name: a, schedules: [{rrule: x}]}]", "prefect.yaml: deployment a: schedule: rrule: *"),
        (
            "deployments: [{name: a, schedules: [{cron: 0 2 * * *, active: perhaps}]}]",
            "prefect.yaml: deployment a: schedule: active: Input should be a valid boolean*",
        ),
        (
            "deployments: [{name: a, schedules: [{timezone: UTC}]}]",
            "prefect.yaml: deployment a: schedule: give one of cron, interval, rrule, not none",
        ),
    ],
)
def test_what_cannot_be_declared_is_one_line(here, text, said):
    if text is not None:
        Path("prefect.yaml").write_text(text)
    found = CliRunner().invoke(main, ["deploy"])
    assert isinstance(found.exception, SystemExit)
    (line,) = found.stderr.splitlines()
    expected = f"finercut deploy: {said}"
    assert line.startswith(expected[:-1]) if expected.endswith("*") else line == expected


@pytest.mark.slow  # imports Prefect anew
def test_a_server_that_does_not_answer_is_one_line(here, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    write({"name": "bare"})
    # Prefect read the address of its server when it was imported.
    command = [sys.executable, "-m", "pipelines.cli", "deploy"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert said.stderr == "finercut deploy: Prefect at http://127.0.0.1:9/api: [Errno 111] Connection refused\n"


def test_a_deployment_that_prefect_does_not_take_is_one_line(here, prefect_server):
    write(nightly(name="odd", version={"a": 1}))
    said = CliRunner().invoke(main, ["deploy"])
    assert said.exit_code == 1
    assert said.stderr == "finercut deploy: prefect deploy: invalid fields: odd: version\n"


def test_a_project_without_pull_steps_works_where_it_lies_and_says_when_it_is_due(here, prefect_server):
    Path("prefect.yaml").write_text(
        """
deployments:
  - name: plain
    schedules:
      - {cron: 30 2 1 1 *, slug: a}
      - {interval: 86400, anchor_date: 2026-01-01, slug: b, active: false}
      - {rrule: '{"rrule": "FREQ=DAILY;COUNT=1;UNTIL=20200101T000000Z", "timezone": "Europe/Rome"}', active: false}
"""
    )
    said = CliRunner().invoke(main, ["deploy"])
    assert said.exit_code == 0, said.stderr
    assert re.search(r"^schedule     cron 30 2 1 1 \*, next at \d{4}-01-01 02:30:00 UTC$", said.stdout, re.MULTILINE)
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("finercut/plain")
    assert found.pull_steps == [{"prefect.deployments.steps.set_working_directory": {"directory": str(Path.cwd())}}]
    assert len(found.schedules) == 3


def test_what_a_params_file_of_the_last_commit_does_not_allow_is_said_before_anything_is_declared(here):
    for command in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "params"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command], check=True)
    parameters = {"params_file": "params.yaml", "overrides": {"prune.bugdet.amount": 0.3}}
    write(nightly(name="odd", parameters=parameters))
    said = CliRunner().invoke(main, ["deploy"])
    assert said.stderr == (
        "finercut deploy: prefect.yaml: deployment odd: overrides: no field prune.bugdet.amount; names look like "
        "prune.budget.amount\n"
    )
    due = {"cron": "0 2 * * *", "parameters": {"overrides": {"prune.budget.amount": "lots"}}}
    write(nightly(name="odd", parameters={"params_file": "params.yaml"}, schedules=[due]))
    (line,) = CliRunner().invoke(main, ["deploy"]).stderr.splitlines()
    assert line.startswith("finercut deploy: prefect.yaml: deployment odd: params.yaml and overrides: prune.budget")


def test_an_alert_goes_to_an_address(here):
    write({"name": "bare"})
    said = CliRunner().invoke(main, ["deploy", "--webhook", "hooks.example"])
    assert said.stderr == "finercut deploy: the webhook of alerts is no address that begins with http:// or https://\n"


def test_of_a_traceback_of_prefect_the_end_is_told():
    said = """Traceback (most recent call last):
  File "x.py", line 1
pydantic_core._pydantic_core.ValidationError: 1 validation error for Deployment
tags
  Input should be a valid list [type=list_type, input_value=3, input_type=int]
    For further information visit https://errors.pydantic.dev/2/v/list_type
An exception occurred.
"""
    assert deployment._reason(said) == (
        "1 validation error for Deployment tags Input should be a valid list [type=list_type, input_value=3, "
        "input_type=int]"
    )
    assert deployment._reason("one\ntwo\n") == "two"
