"""`finercut deploy` on what prefect.yaml may be, on a real Prefect server; no run is started."""

from __future__ import annotations

import copy
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
    nulls = {"accelerator": None, "pull": None, "overrides": {"search.exclude": None}}
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
        assert some.parameters == {"accelerator": None, "overrides": {"search.exclude": None}}
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
            'prefect.yaml: deployment a: schedule: timezone: Invalid timezone: "Mars/Olympus" *',
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
            "prefect.yaml: deployment a: schedule: interval: Input should be greater than *",
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
    write(nightly(name="odd", concurrency_limit={"limit": "many"}))
    said = CliRunner().invoke(main, ["deploy"])
    assert said.exit_code == 1
    assert said.stderr == "finercut deploy: prefect deploy: invalid fields: odd: concurrency_limit\n"


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
