"""MLflow runs and registered versions, in a real SQLite store."""

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import mlflow
import pytest
import requests
import servers
import torch
from conftest import make_tokenizer
from family_models import CASES, random_model

from finercut.checkpoint.writing import write_pruned
from finercut.model.loading import load_pruned
from finercut.registry import runs, served_model, server, versions
from finercut.registry.versions import Registered
from finercut.sublayers import Sublayer
from pipelines import inspection

CONTACTS = [lambda: runs.open_run("tests", {}, {}, "tiny"), lambda: versions.connect("tiny")]


@pytest.fixture
def run(mlflow_store):
    return runs.open_run(
        "tests", {"search": {"divergence": "js", "protect": ["0.block"], "exclude": None}}, {"a": "b"}, "tiny"
    )


@pytest.fixture
def evidence(tmp_path):
    path = tmp_path / "dvc.lock"
    path.write_text("schema: '2.0'\n")
    return path


def status_of(run):
    return run.client.get_run(run.run_id).info.status


def test_credentials_are_not_shown():
    shown = server.without_credentials("postgresql://user:secret@host:5432/mlflow?password=secret")
    assert shown == "postgresql://host:5432/mlflow"
    assert server.without_credentials("sqlite:////srv/mlflow.db") == "sqlite:////srv/mlflow.db"


def test_without_a_setting_the_store_is_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert server.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('"http://127.0.0.1:5000"', r'is "http://127.0.0.1:5000", with quotes in it: take them away$'),
        (
            "http://127.0.0.1:5000/#/experiments/0",
            r"a page of MLflow's: name the server alone, http://127.0.0.1:5000/$",
        ),
    ],
)
def test_an_address_that_was_copied_as_it_stood_says_what_to_take_away(monkeypatch, given, said):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    with pytest.raises(RuntimeError, match=said):
        server.tracking_uri()


def test_an_address_without_its_scheme_is_one_line_and_blanks_around_it_do_not_matter(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "localhost:5000")
    with pytest.raises(
        RuntimeError, match=r"^MLFLOW_TRACKING_URI is localhost:5000: put http:// or https:// before it$"
    ):
        runs.open_run("tests", {}, {}, "tiny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", " http://localhost:5000\n")
    assert server.tracking_uri() == "http://localhost:5000"


@pytest.mark.parametrize(
    ("folder", "given", "refused"),
    [
        ("o'brien", None, True),
        ("why?", None, True),
        ("o'brien", "sqlite:///mlflow.db", True),
        ("why?", "sqlite:///a.db", False),
        ("o'brien", "http://localhost:5000", False),
        ('a #%20 ü"[x] $y', None, False),
    ],
)
def test_a_folder_that_mlflow_keeps_no_runs_in_is_refused(tmp_path, monkeypatch, folder, given, refused):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    if given:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    else:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RuntimeError, match="rename it, or set MLFLOW_TRACKING_URI") if refused else nullcontext():
        server.tracking_uri()


def test_what_mlflow_lists_under_a_heading_is_told(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    listed = mlflow.MlflowException("The following failures occurred:\n\n##### File a/b #####\n\n404 Client Error")
    told = r"^cannot read it in MLflow at .*: The following failures occurred: File a/b$"
    with pytest.raises(RuntimeError, match=told), server.mlflow_errors("read it"):
        raise listed


def test_an_unreachable_server_is_one_line_within_seconds_and_without_credentials(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"cannot open a run in MLflow at http://127\.0\.0\.1:9: ") as error:
        runs.open_run("tests", {}, {}, "tiny")
    assert time.monotonic() - started < 20
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"no database at all" * 100])
@pytest.mark.parametrize("contact", CONTACTS)
def test_a_file_that_is_no_database_is_one_line_within_seconds(content, contact, tmp_path, monkeypatch, caplog):
    file = tmp_path / "mlflow.db"
    file.mkdir() if content is None else file.write_bytes(content)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    with pytest.raises(RuntimeError, match=rf"in MLflow at sqlite:///{file}: [^\n]*(unable to open|not a database)"):
        contact()
    assert "retried" not in caplog.text


def test_a_registry_elsewhere_is_refused_before_a_run_is_opened(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://me:secret@127.0.0.1:8/")
    with pytest.raises(RuntimeError, match=r"^MLFLOW_REGISTRY_URI is http://127.0.0.1:8/, another server than"):
        runs.open_run("tests", {}, {}, "tiny")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9/")
    server.check_registry()


def test_a_prompt_of_the_models_name_is_refused_before_a_run_is_opened(mlflow_store):
    client = mlflow.MlflowClient()
    client.create_prompt("asked")
    with pytest.raises(RuntimeError, match=r"^cannot register asked in MLflow at .*: a prompt has this name: choose"):
        runs.open_run("asks", {}, {}, "asked")
    assert not mlflow.search_runs(experiment_names=["asks"]).size


def test_whoever_may_not_change_the_registered_model_learns_it_before_a_run_is_opened(tmp_path, monkeypatch):
    port, settings = servers.free_port(), tmp_path / "auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path}/auth.db\nadmin_username = admin\n"
        "admin_password = of the admin\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(settings))
    monkeypatch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "a secret")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")  # a busy machine is not what is tested
    address, database = f"http://127.0.0.1:{port}", f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", database, "--artifacts-destination", str(tmp_path / "files")]
    with servers.running(command, tmp_path / "server.log", servers.answers(f"{address}/health")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(RuntimeError, match=r"error code 401.*; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASS"):
            runs.open_run("tests", {}, {}, "tiny")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of the admin")
        mlflow.set_tracking_uri(address)
        mlflow.MlflowClient().create_registered_model("tiny")
        reader = {"username": "reader", "password": "of the reader"}
        admin = ("admin", "of the admin")
        requests.post(f"{address}/api/2.0/mlflow/users/create", json=reader, auth=admin, timeout=60).raise_for_status()
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of the reader")
        with pytest.raises(RuntimeError, match=r"^cannot register tiny in MLflow at .*Permission denied"):
            runs.open_run("tests", {}, {}, "tiny")
        assert not mlflow.search_runs(experiment_names=["tests"]).size
        assert runs.open_run("tests", {}, {}, "readers_own").run_id


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    """A project whose store is its own folder's."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    opened = runs.open_run("tests", {}, {}, "tiny")
    opened.client.create_registered_model("tiny")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow set it
    yield project
    mlflow.set_tracking_uri(None)


@pytest.mark.parametrize("contact", CONTACTS)
def test_a_copy_of_a_project_does_not_touch_the_files_of_the_first(own_store, tmp_path, monkeypatch, contact):
    monkeypatch.chdir(shutil.copytree(own_store, tmp_path / "copy"))
    with pytest.raises(
        RuntimeError, match=rf"^mlflow.db is of the project at {own_store}, .*; in a copy, delete mlflo"
    ):
        contact()


@pytest.mark.parametrize("contact", CONTACTS)
def test_a_project_that_was_moved_says_how_its_files_are_found_again(own_store, tmp_path, monkeypatch, contact):
    moved = own_store.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    with pytest.raises(RuntimeError, match=rf"after a move, `ln -s {moved} {own_store}`"):
        contact()
    own_store.symlink_to(moved)
    contact()


def test_what_the_database_said_is_told_and_not_sqlalchemys_advice(own_store):
    with sqlite3.connect("mlflow.db") as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON runs BEGIN SELECT RAISE(ABORT, 'no more runs'); END")
    with pytest.raises(RuntimeError, match="cannot open a run in MLflow at sqlite:.*no more runs"):
        runs.open_run("tests", {}, {}, "tiny")


def test_two_executions_that_begin_at_once_share_a_new_experiment(mlflow_store, monkeypatch):
    first, found = runs.open_run("at once", {}, {}, "tiny"), mlflow.MlflowClient.get_experiment_by_name
    calls = []

    def lookup(client, name):
        calls.append(name)
        return None if len(calls) == 1 else found(client, name)

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", lookup)
    assert runs.open_run("at once", {}, {}, "tiny").experiment_id == first.experiment_id


def test_a_deleted_experiment_is_refused_with_the_way_to_restore_it(mlflow_store):
    gone = runs.open_run("gone", {}, {}, "tiny")
    gone.client.delete_experiment(gone.experiment_id)
    with pytest.raises(RuntimeError, match=rf"'gone'.*deleted.*mlflow experiments restore -x {gone.experiment_id}"):
        runs.open_run("gone", {}, {}, "tiny")


def test_a_run_starts_with_its_flattened_parameters_and_tags(run):
    data = run.client.get_run(run.run_id).data
    assert data.params == {"search.divergence": "js", "search.protect": '["0.block"]', "search.exclude": "null"}
    assert data.tags["a"] == "b"


def test_artifacts_stay_where_they_are_when_read_from_another_directory(run, evidence, tmp_path, monkeypatch):
    run.log_file(evidence, "pipeline")
    monkeypatch.chdir(tmp_path)
    path = mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path="pipeline/dvc.lock")
    assert Path(path).read_text() == evidence.read_text()


def test_a_run_ends_finished_failed_with_log_and_reason_or_killed(mlflow_store, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("search: out of memory\n")
    finished, failed, killed = (runs.open_run("ends", {}, {}, "tiny") for _ in range(3))
    with runs.recorded(finished):
        assert status_of(finished) == "RUNNING"
    with pytest.raises(RuntimeError), runs.recorded(failed, log):
        raise RuntimeError("search: out of memory")
    with pytest.raises(KeyboardInterrupt), runs.recorded(killed):
        raise KeyboardInterrupt
    assert [status_of(r) for r in (finished, failed, killed)] == ["FINISHED", "FAILED", "KILLED"]
    assert failed.client.get_run(failed.run_id).data.tags["failure"] == "search: out of memory"
    stored = mlflow.artifacts.download_artifacts(run_id=failed.run_id, artifact_path="log.txt")
    assert Path(stored).read_text() == "search: out of memory\n"


def test_the_numbers_of_a_report_are_its_finite_leaves(tmp_path):
    report = tmp_path / "evaluate.json"
    report.write_text(
        json.dumps({"passed": True, "note": "x", "none": None, "list": [1], "tasks": {"a|b": {"acc": 0.5}}})
    )
    assert runs.numbers(report) == {"evaluate/passed": 1.0, "evaluate/tasks/a_b/acc": 0.5}


def test_keys_that_are_paths_or_long_become_names_that_mlflow_takes(run, tmp_path):
    keys = ["/data/a.txt", "../data/b.txt", "./data/a.txt", "a//b", "x" * 300, "x" * 299 + "y"]
    report = tmp_path / "evaluate.json"
    report.write_text(json.dumps({"by_source": {key: n + 0.5 for n, key in enumerate(keys)}}))
    found = runs.numbers(report)
    assert sorted(found.values()) == [n + 0.5 for n in range(6)]
    assert found["evaluate/by_source/data/a.txt"] == 0.5
    run.log_reports([report])
    assert run.client.get_run(run.run_id).data.metrics == found


@pytest.mark.parametrize("given", ["sqlite://", "sqlite:///:memory:", "sqlite:///"])
def test_a_database_that_ends_with_the_process_is_refused(monkeypatch, given):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    with pytest.raises(RuntimeError, match="a database that ends with the process: name a file"):
        server.tracking_uri()


def test_reports_become_metrics_series_and_artifacts(run, tmp_path):
    report, curve, picture = tmp_path / "search.json", tmp_path / "curve.csv", tmp_path / "search.png"
    report.write_text('{"final_divergence": 0.25}')
    curve.write_text("step,sublayer,divergence\n1,2.attention,0.125\n2,3.mlp,0.25\n")
    picture.write_bytes(b"png")
    run.log_reports([report, curve, picture])
    assert run.client.get_run(run.run_id).data.metrics["search/final_divergence"] == 0.25
    history = run.client.get_metric_history(run.run_id, "curve/divergence")
    assert [(m.step, m.value) for m in history] == [(1, 0.125), (2, 0.25)]
    names = {a.path for a in run.client.list_artifacts(run.run_id, "reports")}
    assert names == {"reports/search.json", "reports/curve.csv", "reports/search.png"}


def test_a_version_carries_its_evidence_and_can_be_downloaded_loaded_and_asked(run, evidence, tiny_model):
    registered = versions.register(
        run, "tiny", tiny_model, [evidence], {"throughput/speed_up": 1.25}, {"parent": "toy", "gate": "passed"}, "md5-1"
    )
    assert registered == Registered("1", "models:/tiny/1")
    versions.challenge(run, "tiny", "1")

    found = run.client.get_model_version_by_alias("tiny", "challenger")
    assert str(found.version) == "1"
    assert found.run_id == run.run_id
    assert found.tags == {"parent": "toy", "gate": "passed", "finercut.pruned_md5": "md5-1"}
    logged = run.client.get_logged_model(found.source.removeprefix("models:/"))
    assert [(m.key, m.value) for m in logged.metrics] == [("throughput/speed_up", 1.25)]

    directory = Path(mlflow.artifacts.download_artifacts("models:/tiny@challenger"))
    weights = directory / "checkpoint" / "model.safetensors"
    assert weights.read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert (directory / "evidence" / "dvc.lock").read_text() == evidence.read_text()

    answers = mlflow.pyfunc.load_model("models:/tiny@challenger").predict(
        ["The river rises", "Coffee"], params={"max_new_tokens": 4}
    )
    assert answers == [continuation(tiny_model, prompt) for prompt in ("The river rises", "Coffee")]
    with pytest.raises(ValueError, match="the prompt '' has no tokens to continue: give some text"):
        mlflow.pyfunc.load_model("models:/tiny@challenger").predict([""])

    assert versions.find_version(run, "tiny", "md5-1") == registered
    assert versions.find_version(run, "tiny", "md5-2") is None
    assert versions.find_version(run, "tiny", "md5-1", collected={"1"}) is None
    told = inspection.describe("models:/tiny@challenger")
    assert "tiny version 1" in told
    assert "challenger" in told
    assert "passed" in told


def test_a_soft_cap_that_its_config_leaves_to_the_class_is_applied_too(run, evidence, tokenizer, tmp_path):
    """Its config.json need not name the soft cap, which Gemma 2 has by default."""
    whole, pruned = tmp_path / "whole", tmp_path / "pruned"
    _, changes = CASES["gemma2"]
    random_model("gemma2", **changes | {"attn_logit_softcapping": 50.0}).save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    config = json.loads((whole / "config.json").read_text())
    del config["attn_logit_softcapping"]
    (whole / "config.json").write_text(json.dumps(config))
    write_pruned(whole, [Sublayer(1, "attention"), Sublayer(2, "mlp")], pruned, {"source": "tiny"}, "# card\n")
    versions.register(run, "soft-caps", pruned, [evidence], {}, {}, "md5")

    served = mlflow.pyfunc.load_model("models:/soft-caps/1")
    model = served.unwrap_python_model().model
    expected = load_pruned(pruned)
    ids = tokenizer("The river rises in the mountains of the north", return_tensors="pt")["input_ids"]
    assert model.config._attn_implementation == expected.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    output = expected.generate(ids, max_new_tokens=6, do_sample=False)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    prompt = ["The river rises in the mountains of the north"]
    assert served.predict(prompt, params={"max_new_tokens": 6}) == [text]


def test_a_version_requires_the_libraries_that_its_evidence_comes_from(run, evidence, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    measured_with = {"torch": "2.11.0+cu130", "vllm": "vllm 0.32.0", "hardware": "cpu"}
    versions.register(run, "libraries", checkpoint, [evidence], {}, {}, "md5", measured_with)
    path = mlflow.artifacts.download_artifacts("models:/libraries/1/requirements.txt")
    installed = {name: version(name) for name in ("mlflow", "transformers")}
    assert Path(path).read_text().split() == [
        f"mlflow=={installed['mlflow']}",
        "torch==2.11.0",
        f"transformers=={installed['transformers']}",
    ]
    (checkpoint / "config.json").write_text('{"quantization_config": {}}')
    quantised = measured_with | {"compressed-tensors": "0.13"}
    versions.register(run, "libraries", checkpoint, [evidence], {}, {}, "other md5", quantised)
    path = mlflow.artifacts.download_artifacts("models:/libraries/2/requirements.txt")
    assert Path(path).read_text().split()[-1] == "compressed-tensors==0.13"


def continuation(directory, prompt):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=4, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_versions_are_numbered_and_the_challenger_is_the_one_that_is_named(run, evidence, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    made = [versions.register(run, "twice", checkpoint, [evidence], {"a": 1.0}, {}, md5).version for md5 in "xy"]
    assert made == ["1", "2"]
    assert run.client.get_registered_model("twice").aliases == {}
    for number in "211":
        versions.challenge(run, "twice", number)
        assert str(run.client.get_model_version_by_alias("twice", "challenger").version) == number


def test_a_version_that_something_else_made_does_not_count(run):
    run.client.create_registered_model("strangers")
    run.client.create_model_version("strangers", source=f"runs:/{run.run_id}/x", run_id=run.run_id)
    assert versions.find_version(run, "strangers", "md5") is None


@pytest.mark.slow
def test_a_model_with_soft_caps_is_served_as_it_was_evaluated(tmp_path):
    model_type, changes = CASES["gemma2"]
    random_model(model_type, **changes).save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    write_pruned(tmp_path / "whole", [Sublayer(1, "mlp")], tmp_path / "version" / "checkpoint", {}, "")
    shutil.copy(served_model.__file__, tmp_path / "version")
    code = (
        "import json, sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "import served_model\n"
        "served = served_model.ServedModel(); served.load_context(None)\n"
        "ids = torch.tensor([json.loads(sys.argv[2])])\n"
        "print(json.dumps(served.model(ids).logits[0, -1].tolist()))"
    )
    ids = [3, 50, 120, 7, 90]
    command = [sys.executable, "-c", code, str(tmp_path / "version"), json.dumps(ids)]
    served = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    with torch.no_grad():
        expected = load_pruned(tmp_path / "version" / "checkpoint")(torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(torch.tensor(served), expected, atol=1e-5)
