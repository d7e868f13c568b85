"""What an operator meets: killed stages, lost servers, full disks, a second execution. Everything fails for real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import full_disk
import mlflow
import pytest
import yaml
from click.testing import CliRunner
from conftest import TEXT
from hub_server import COMMIT, Hub, Repository, client_environment, serve
from kill_executions import prepare_registration, registration_trials
from kill_stages import CHEAP, ROOT, outputs, prepare, state, trials

from finercut.registry import runs
from finercut.selection.trajectory import read_trajectory
from pipelines import paths, register
from pipelines.cli import main
from pipelines.params import load

N_KILLS = 2
"""One without and one with an earlier output; `make trials` makes many."""
LOST = "http://127.0.0.1:9"


def finercut(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_model) -> Path:
    """A project in which everything up to `evaluate` has run."""
    root = tmp_path_factory.mktemp("faults")
    (root / "text.txt").write_text("\n\n".join(TEXT * 6))
    prepare(root / "base", tiny_model, root / "text.txt")
    return root / "base"


@pytest.fixture
def project(base, tmp_path) -> Path:
    return shutil.copytree(base, tmp_path / "project", ignore=shutil.ignore_patterns(".finercut"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A committed repository whose toy stages have run, with an MLflow store."""
    root = tmp_path_factory.mktemp("repository")
    prepare_registration(root)
    return root


@pytest.fixture
def toy(repository, tmp_path, monkeypatch) -> Path:
    root = shutil.copytree(repository, tmp_path / "toy")
    monkeypatch.chdir(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    return root


# Kills


# As `heal` and `evaluate` do.
ALIKE = ("quantise", "evaluate_whole")


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[pytest.mark.matrix] if stage in ALIKE else []) for stage in CHEAP]
)
def test_a_killed_stage_leaves_nothing_half_written_and_comes_to_the_same_bytes(base, tmp_path, stage):
    done = list(trials(stage, base, tmp_path / "project", N_KILLS, seed=1))
    assert [trial for trial in done if not trial.whole] == []
    assert [trial for trial in done if not trial.same] == []
    assert max(trial.redone for trial in done) <= 1


def test_a_killed_registration_comes_to_one_complete_version(repository, tmp_path):
    done = list(registration_trials(repository, tmp_path / "project", N_KILLS, seed=1))
    assert [trial for trial in done if not (trial.whole and trial.same)] == []


# MLflow


def test_a_lost_mlflow_is_found_out_before_anything_is_done(toy, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", LOST)
    done = CliRunner().invoke(main, ["register"])
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(f"finercut register: cannot open a run in MLflow at {LOST}: ")
    assert not Path("reports/register.json").exists()


def test_a_database_that_does_not_answer_is_found_out_in_seconds_and_its_password_not_shown(toy):
    lost = "postgresql+psycopg://finercut:canary-password@127.0.0.1:9/mlflow"
    done = finercut("register", cwd=toy, MLFLOW_TRACKING_URI=lost)
    assert said(done).startswith(
        "finercut register: cannot open a run in MLflow at postgresql+psycopg://127.0.0.1:9/mlflow: "
    )
    assert "canary-password" not in done.stdout + done.stderr
    assert "will be retried" not in done.stderr


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    log = (folder / "server.log").open("a")
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        cwd=folder,
        env=os.environ | {"MLFLOW_TRACKING_URI": "", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not _answers(port):
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# Waits for a line after every removal, so that the server can be taken away in between.
IN_STEPS = """
import sys
from pipelines import params
from finercut.registry import live
from finercut.selection import trajectory
from pipelines import search
live.PAUSE_S = 0
append = trajectory.append
def append_and_wait(path, removal):
    append(path, removal)
    print(removal.step, flush=True)
    sys.stdin.readline()
search.trajectory.append = append_and_wait
search.run(params.load())
"""


def test_a_search_outlives_mlflow_delivers_what_it_kept_and_says_what_is_lost(project, base, tmp_path):
    for path in outputs("search"):
        (project / path).unlink()
    port = free_port()
    environment = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def go_on(search: subprocess.Popen, step: int) -> None:
        search.stdin.write("\n")
        search.stdin.flush()
        assert search.stdout.readline() == f"{step}\n"

    with mlflow_server(tmp_path, port):
        client = mlflow.MlflowClient(environment["MLFLOW_TRACKING_URI"])
        run_id = client.create_run(client.create_experiment("faults")).info.run_id
        search = subprocess.Popen(
            [sys.executable, "-c", IN_STEPS],
            cwd=project,
            env=os.environ | environment | {"MLFLOW_RUN_ID": run_id},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert search.stdout.readline() == "1\n", search.communicate()[1]
        go_on(search, 2)
    go_on(search, 3)  # the second removal's figures find no server
    go_on(search, 4)
    with mlflow_server(tmp_path, port):
        go_on(search, 5)
        history = client.get_metric_history(run_id, "live search/divergence")
    go_on(search, 6)
    _, told = search.communicate("\n", timeout=120)
    assert search.returncode == 0, told
    removals = read_trajectory(project / paths.TRAJECTORY).removals
    assert [(point.step, point.value) for point in history] == [(r.step, r.divergence) for r in removals[:4]]
    assert told.count("going on, they are kept") == 2
    # five figures and the controls of each of the last two removals
    n_lost = sum(5 + len(removal.controls.model_dump(exclude_none=True)) for removal in removals[4:])
    assert f"MLflow still takes no live metrics: {n_lost} points are lost" in told
    assert state(project, "search") == state(base, "search")


# A full disk


TRIALS = ("fetch:0", "fetch:500K", "calibrate:0", "search:0", "search:4K", "prune:0", "prune:1M", "evaluate:0")
"""Stages, and the room that the disk has left for each."""


@pytest.fixture(scope="module")
def full(base, tmp_path_factory) -> Path:
    """What every one of TRIALS left, a folder for each."""
    left = tmp_path_factory.mktemp("full")
    subprocess.run(
        ["unshare", "-rm", sys.executable, full_disk.__file__, str(base), str(left), *TRIALS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "trials")))},
        check=True,
    )
    return left


@pytest.mark.parametrize("trial", TRIALS)
def test_a_full_disk_is_one_line_nothing_half_written_and_room_is_all_it_takes(full, base, trial):
    stage, left = trial.partition(":")[0], full / trial
    assert (left / "status").read_text() == "1"
    lines = (left / "said").read_text().splitlines()
    assert "Traceback" not in "".join(lines)
    assert lines[-1].startswith(f"finercut {stage}: "), lines
    assert "o space left on device" in lines[-1]
    assert set(state(left / "after", stage).values()) <= {None, *state(base, stage).values()}
    assert state(left / "after", stage)[paths.report(stage)] is None
    assert state(left / "again", stage) == state(base, stage)


# The hub

FETCH = """
import logging, sys
from finercut.serving import vllm_engine
from pipelines.params import Params
from pipelines import fetch
vllm_engine.find_spec = lambda name: None
logging.basicConfig(format="%(message)s", level=logging.INFO)
for settings in sys.argv[1:]:
    try:
        fetch.run(Params.model_validate_json(settings))
    except (ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}; is there a model: {fetch.paths.MODEL.exists()}")
"""


def fetched(hub: Hub, folder: Path, *revisions: str) -> subprocess.CompletedProcess[str]:
    """What fetching one after another comes to."""
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["evaluate"]["tasks"] = []
    sources = [{"kind": "hub", "repository": "org/tiny", "revision": revision} for revision in revisions]
    each = [json.dumps(settings | {"fetch": {"source": source}}) for source in sources]
    return subprocess.run(
        [sys.executable, "-c", FETCH, *each],
        cwd=folder,
        env=client_environment(hub.endpoint, folder / "home"),
        capture_output=True,
        text=True,
        check=False,
    )


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def same_but_for_tokenizer_config(fetched: Path, published: Path) -> bool:
    """`fetch` writes that file anew, with everything that transformers makes of it."""
    ours, theirs = files_of(fetched), files_of(published)
    settings = [json.loads(files.pop("tokenizer_config.json")) for files in (ours, theirs)]
    return ours == theirs and settings[0].items() >= settings[1].items()


def test_a_hub_that_stumbles_is_asked_again(tiny_model, tmp_path):
    hub = Hub({"org/tiny": Repository(COMMIT, files_of(tiny_model), status=503, n_failures=2)})
    with serve(hub):
        done = fetched(hub, tmp_path, "main")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.count("org/tiny: 503; trying again in") == 2
    assert same_but_for_tokenizer_config(tmp_path / paths.MODEL, tiny_model)


def test_without_a_hub_a_pinned_commit_comes_from_the_cache_and_a_branch_does_not(tiny_model, tmp_path):
    hub = Hub({"org/tiny": Repository(COMMIT, files_of(tiny_model))})
    with serve(hub):
        download = f"from huggingface_hub import snapshot_download; snapshot_download('org/tiny', revision='{COMMIT}')"
        environment = client_environment(hub.endpoint, tmp_path / "home")
        subprocess.run([sys.executable, "-c", download], env=environment, check=True, capture_output=True)
    done = fetched(hub, tmp_path, "main", COMMIT)
    assert done.returncode == 0, done.stderr
    (refused,) = done.stdout.splitlines()
    assert refused.startswith(f"NoAnswer: cannot reach {hub.endpoint}/org/tiny: check the network")
    assert refused.endswith("is there a model: False")
    assert "taking the commit from the Hugging Face cache" in done.stderr
    assert same_but_for_tokenizer_config(tmp_path / paths.MODEL, tiny_model)
    assert not any(file.is_symlink() for file in (tmp_path / paths.MODEL).iterdir())
    assert json.loads((tmp_path / paths.report("fetch")).read_text())["revision"] == COMMIT


# Two at once


def test_a_second_stage_in_the_same_workspace_is_refused_and_the_first_not_disturbed(project, base, monkeypatch):
    for path in outputs("search"):
        (project / path).unlink()
    first = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "search"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    lock = project / paths.WORK / "lock"
    while not (lock.exists() and lock.read_text()):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    try:
        line = said(finercut("prune", cwd=project))
    finally:
        first.send_signal(signal.SIGCONT)
    assert line == f"finercut prune: process {first.pid} works in {project}: wait until it has ended, or end it"
    _, told = first.communicate(timeout=300)
    assert first.returncode == 0, told
    assert state(project, "search") == state(base, "search")
    monkeypatch.chdir(project)
    assert CliRunner().invoke(main, ["prune"]).exit_code == 0


def test_of_two_dvc_repros_at_once_one_may_be_refused_and_neither_harms_the_other(toy):
    Path("speed_up.txt").write_text("1.5")
    command = [sys.executable, "-m", "dvc", "repro", "-f"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300)[0] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes, told
    for code, text in zip(codes, told, strict=True):
        assert code == 0 or "lock" in text or "busy" in text, text
    status = subprocess.run([sys.executable, "-m", "dvc", "status"], capture_output=True, text=True, check=True).stdout
    assert "up to date" in status
    assert json.loads(Path("reports/throughput.json").read_text())["speed_up"] == 1.5


# The clock, the git tree


def test_a_clock_that_jumps_back_and_a_dirty_tree_are_recorded_and_not_fatal(toy, monkeypatch):
    subprocess.run(["git", "add", "-A"], check=True)
    Path("notes.txt").write_text("not committed")
    now = time.time
    opened = runs.open_run

    def jump(*arguments, **options):
        run = opened(*arguments, **options)
        monkeypatch.setattr(time, "time", lambda: now() - 3600)
        return run

    monkeypatch.setattr(runs, "open_run", jump)
    report = register.run(load())
    assert report.status == "registered"
    found = mlflow.MlflowClient().get_run(report.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.end_time < found.info.start_time
    assert found.data.tags["git.dirty"] == "true"
