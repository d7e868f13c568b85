"""Settings that cannot be, through the commands: one line, a status that is not 0, and nothing written."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from bad_input import ROOT, VALID, complaint, names, refused, set_params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finercut.selection.settings import Budget
from finercut.system import yaml_files
from pipelines import params

PARAMS_FILES = {
    "empty": b"",
    "null": b"null",
    "list": b"- fetch\n- calibrate\n",
    "text": b"compress my model, please",
    "number": b"4",
    "unfinished": b"fetch: {source: {kind: local, path: mine}",
    "tabs": b"fetch:\n\tsource: x\n",
    "binary": bytes(range(256)),
    "utf-16": "fetch: {}".encode("utf-16"),
    "latin-1": "fetch: caf\xe9".encode("latin-1"),
    "object": b"fetch: !!python/object/apply:os.system ['touch owned']\n",
    "two documents": b"fetch: {}\n---\ncalibrate: {}\n",
    "unknown anchor": b"fetch: *nothing\n",
    "unhashable key": b"{[1, 2]: 3}\n",
    "number as key": b"1: 2\n",
    "wrong tag": b"fetch: !!bool maybe\n",
    "no time": b"fetch: !!timestamp now\n",
    "no day": b"fetch: 2026-02-30\n",
    "deep": b"[" * 2000,
    "duplicate key": (ROOT / "params.yaml").read_bytes() + b"\nprune: {budget: {unit: sublayers, amount: 0.5}}\n",
    "recursive": b"fetch: &a {source: *a}\n",
}


@pytest.mark.parametrize("content", PARAMS_FILES.values(), ids=PARAMS_FILES)
def test_a_params_file_that_is_none(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes(content)
    said = complaint(params.load, Path("params.yaml"))
    assert names(Path("params.yaml"), said)
    assert not said.endswith("is good")
    assert not Path("owned").exists()


@pytest.mark.parametrize("content", ["fetch: {source: {kind: local", "fetch: {}\nfetch: {}\n", "a: 1"])
def test_a_command_refuses_it_and_writes_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(content)
    for command in ("params", "search", "run"):
        assert "params.yaml" in refused(command)


PARAMS = [
    ("fetch", None),
    ("fetch.source", "mine"),
    ("fetch.source", {}),
    ("fetch.source", {"kind": "ftp", "path": "mine"}),
    ("fetch.source", {"kind": "local"}),
    ("fetch.source", {"kind": "local", "path": 3}),
    ("fetch.source", {"kind": "hub", "repository": "org/name"}),
    ("fetch.source", {"kind": "hub", "repository": "../../etc", "revision": "main"}),
    ("fetch.source", {"kind": "hub", "repository": "https://huggingface.co/org/name", "revision": "main"}),
    ("fetch.source", {"kind": "hub", "repository": "org/name", "revision": 1234567}),
    ("fetch.source", {"kind": "hub", "repository": "org/name", "revision": ""}),
    ("fetch.source.version", 0.1),
    ("fetch.source.name", ""),
    ("fetch.source.name", "x\n--index-url http://127.0.0.1:9/"),
    ("fetch.source.name", "--index-url"),
    ("fetch.source.name", "x @ file:///tmp/x.whl"),
    ("fetch.source.version", "1.0 --no-require-hashes"),
    ("fetch.source.version", ">=1"),
    ("fetch.source.sha256", "bcc81830"),
    ("fetch.source.sha256", 64 * "Z"),
    ("fetch.source.dtype", "int8"),
    ("calibrate.source", {"kind": "files", "paths": []}),
    ("calibrate.source", {"kind": "files", "paths": "text.txt"}),
    ("calibrate.source", {"kind": "hub", "dataset": "org/name", "revision": "main"}),
    ("calibrate.n_samples", 0),
    ("calibrate.n_samples", -1),
    ("calibrate.n_samples", 2.5),
    ("calibrate.n_samples", True),
    ("calibrate.n_samples", "8"),
    ("calibrate.n_samples", None),
    ("calibrate.n_tokens", 1),
    ("calibrate.shuffle_seed", "random"),
    ("search.divergence", "cosine"),
    ("search.candidates", ["attention"]),
    ("search.protect", "0.block"),
    ("search.protect", [0.5]),
    ("search.exclude", 1.0),
    ("search.exclude", float("nan")),
    ("search.removals", 0),
    ("search.removals", 1.5),
    ("search.removals", float("nan")),
    ("search.removals", True),
    ("search.dtype", "fp32"),
    ("search.device", 0),
    ("prune.budget", {"unit": "sublayers"}),
    ("prune.budget", {"unit": "layers", "amount": 0.25}),
    ("prune.budget", {"unit": "parameters", "amount": 3}),
    ("prune.budget", {"unit": "kv_cache", "amount": -0.1}),
    ("prune.budget", {"unit": "sublayers", "amount": 3.5}),
    ("prune.budget", {"unit": "speed_up", "amount": 0.9}),
    ("prune.budget.amount", "25%"),
    ("evaluate.tasks", {"name": "piqa", "metric": "acc"}),
    ("evaluate.tasks", [{"name": "piqa"}]),
    ("evaluate.tasks", [{"name": "piqa", "metric": "acc", "n_shot": 5}]),
    ("evaluate.tasks", [{"name": "piqa", "metric": "acc", "limit": 0}]),
    ("evaluate.seed", -1),
    ("evaluate.seed", 2**32),
    ("evaluate.batch_size", 0),
    ("prove.logit_tolerance", 0),
    ("prove.logit_tolerance", float("inf")),
    ("throughput", VALID["throughput"] | {"max_model_len": 64}),
    (
        "throughput",
        VALID["throughput"] | {"more_loads": [{"input_tokens": 500, "output_tokens": 64, "concurrency": 1}]},
    ),
    ("throughput.kv_cache_gib", float("inf")),
    ("throughput.enforce_eager", "perhaps"),
    ("throughput.n_rounds", 1),
    ("register.name", "team/model"),
    ("register.name", "model-0.25"),
    ("register.name", "a' or name != '"),
    ("register.name", ""),
    ("register.min_retention", "high"),
    ("flow.experiment", ""),
    ("flow.retries", {"fetsh": 2}),
    ("flow.retries", {"fetch": -1}),
    ("flow.retry_delay_s", float("inf")),
    ("flow.timeout_s", {"search": 0}),
    ("flow.timeout_s", 3600),
    ("flow.timeouts", {"search": 1}),
    ("registry", {}),
    ("register.name", "a" * 201),
    ("collect.unfinished_days", 1e6),
    ("heal.seed", 2**32),
]


@pytest.mark.parametrize(("field", "value"), PARAMS, ids=[f"{field}={value!r}"[:60] for field, value in PARAMS])
def test_a_field_that_cannot_be(field, value):
    values = copy.deepcopy(VALID)
    *sections, last = field.split(".")
    section = values
    for key in sections:
        section = section[key]
    section[last] = value
    with pytest.raises(ValueError) as raised:
        params.parse(yaml_files.dump(values), "params.yaml")
    said = str(raised.value)
    assert said.startswith(f"params.yaml: {field}: ") or f" {field}." in said
    assert names(Path("params.yaml"), said)
    assert "pydantic" not in said


REFIT = {"method": "refit", "ridges": [0.1], "fractions": [1.0], "batch_tokens": 64, "dtype": "auto", "device": "cpu"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibrate.n_tokens": 1024}, "heal.batch_tokens = 512 is less than a window of 1024 tokens"),
        ({"heal.tokens": 511}, "heal.tokens = 511 is less than one step of 512"),
        (
            {"heal": REFIT, "calibrate.n_healing_samples": 1, "calibrate.sources": [{"kind": "files", "paths": ["a"]}]},
            "heal.method refit fits to some windows and judges by others: set calibrate.n_healing_samples to 2",
        ),
    ],
)
def test_healing_that_its_windows_do_not_allow_is_refused_at_the_start(changes, said):
    values = copy.deepcopy(VALID)
    for field, value in changes.items():
        section, _, last = field.rpartition(".")
        (values[section] if section else values)[last] = value
    with pytest.raises(ValueError, match=said):
        params.parse(yaml_files.dump(values), "params.yaml")


def _leaves(values: object, path: tuple = ()) -> list[tuple]:
    if isinstance(values, dict) and values:
        return [leaf for key, value in values.items() for leaf in _leaves(value, (*path, key))]
    return [path]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@given(path=st.sampled_from(_leaves(VALID)), value=JUNK)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field_is_taken_or_named(tmp_path, path, value):
    values = copy.deepcopy(VALID)
    section = values
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    file = tmp_path / "params.yaml"
    file.write_text(yaml_files.dump(values), encoding="utf-8", errors="surrogatepass")
    assert names(file, complaint(params.load, file))


@given(content=st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_params_are_refused_in_one_line(tmp_path, content):
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    assert names(file, complaint(params.load, file))


@pytest.mark.parametrize("stage", ["search", "evaluate_whole"])
@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta", "cpu:x", "cuda:-1"])
def test_a_device_that_is_not_here(workspace, stage, device):
    set_params(search__device=device, evaluate__device=device)
    assert f"no device {device!r} here" in refused(stage)


@pytest.mark.parametrize(("amount", "said"), [(1e-6, "less than any single candidate"), (0.999, "more than all")])
def test_a_budget_of_a_frontier_that_cannot_be_reached_is_told_before_any_is_searched_for(workspace, amount, said):
    from pipelines.flow import _check_reach

    reached = params.load()
    budget = Budget(unit="parameters", amount=amount)
    other = reached.model_copy(update={"prune": reached.prune.model_copy(update={"budget": budget})})
    _check_reach([reached])
    with pytest.raises(ValueError, match=rf"^prune\.budget = {amount} parameters is {said}"):
        _check_reach([reached, other])
