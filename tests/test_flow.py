"""The flow on real DVC, Prefect and MLflow; its stages are toys that write reports."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID

import example_reports
import mlflow
import psutil
import pytest
import yaml
from holder import holding
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from toy import ROOT, STAGES, make_toy, write

from finercut.registry import versions
from finercut.registry.ledger import Ledger
from finercut.registry.records import RegisterReport
from finercut.sources import revisions
from finercut.system.processes import end_group, start_group
from finercut.system.staging import HELD_BY
from pipelines import dag, paths, register
from pipelines.flow import _edited, compress, run_group
from pipelines.params import Params, load

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def toy(tmp_path, mlflow_store, monkeypatch):
    """A committed repository of three toy stages, and the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return make_toy()


@pytest.fixture(scope="module")
def first(tmp_path_factory, sqlite_store, prefect_server):
    """Such a repository in which the flow has run: its directory, its settings and the report."""
    root = tmp_path_factory.mktemp("executed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("MLFLOW_TRACKING_URI", sqlite_store)
        return root, make_toy(), compress()


@pytest.fixture
def executed(first, mlflow_store, monkeypatch):
    """The settings and the first report of that repository, which is the current directory; tests add to it."""
    root, settings, report = first
    monkeypatch.chdir(root)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return settings, report


def runs(experiment):
    """Newest first."""
    client = mlflow.MlflowClient()
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def processes_with(mark):
    return [p for p in psutil.process_iter(["cmdline"]) if any(mark in part for part in p.info["cmdline"] or ())]


def gone(mark, within_s=20):
    deadline = time.monotonic() + within_s
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes_with(mark)


def test_an_execution_is_one_finished_run_with_every_figure_and_a_registered_version(executed):
    toy, report = executed
    assert report.status == "registered"
    assert RegisterReport.read(Path("reports/register.json")) == report

    (run,) = runs(toy["flow"]["experiment"])
    assert run.info.run_id == report.run_id
    assert run.info.status == "FINISHED"
    assert {name: run.data.tags[f"stage.{name}"] for name in STAGES} == dict.fromkeys(STAGES, "ran")
    assert run.info.run_name == "SmolLM2-135M-Instruct.Q4_1 less 13.8 % of parameters"
    assert run.data.tags["mlflow.note.content"].startswith("**toy: 2 of 8 sublayers removed**: sublayers -25.0 %, ")
    assert (run.data.tags["mlflow.user"], run.data.tags["mlflow.source.name"]) == (getpass.getuser(), "finercut run")
    kind = mlflow.MlflowClient().get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    assert run.data.tags["git.dirty"] == "false"
    assert run.data.metrics["throughput/speed_up"] == 1.25
    assert run.data.metrics["evaluate/tasks/finercut_copying/pruned"] == 0.6
    assert run.data.metrics["stage/prune_s"] > 0
    assert run.data.params["prune.budget.amount"] == str(toy["prune"]["budget"]["amount"])
    client = mlflow.MlflowClient()
    stored = {
        a.path for folder in (None, "reports", "pipeline") for a in client.list_artifacts(run.info.run_id, folder)
    }
    assert {
        "log.txt",
        "reports/register.json",
        "reports/curve.csv",
        "pipeline/dvc.lock",
        "pipeline/params.yaml",
    } <= stored
    version = client.get_model_version_by_alias(toy["register"]["name"], "challenger")
    assert version.tags["removals"] == "2.attention, 3.mlp"
    deciding = {"share.parameters": 0.2, "mean_retention": 0.75, "perplexity_ratio": 1.5, "speed_up": 1.25}
    assert {name: version.tags[name] for name in deciding} == {name: f"{value:.4f}" for name, value in deciding.items()}
    (logged,) = client.search_logged_models([run.info.experiment_id], "metrics.`share.parameters` > 0.1")
    assert {m.key: m.value for m in logged.metrics if m.key in deciding} == deciding
    assert "x 1.25" in version.description
    assert "challenger" in client.get_registered_model(toy["register"]["name"]).description
    assert version.tags["mlflow.source.git.commit"] == dag.revision()["mlflow.source.git.commit"]
    stored = {a.path for a in client.list_logged_model_artifacts(version.source.removeprefix("models:/"), "evidence")}
    assert {"evidence/dvc.lock", "evidence/evaluate.json"} <= stored


def test_prefect_shows_each_run_by_model_and_budget_with_the_figures_and_progress_of_its_stages(executed):
    _, report = executed
    run = mlflow.MlflowClient().get_run(report.run_id)
    flow_run, _ = task_runs(run)
    assert flow_run.name == run.info.run_name
    with get_client(sync_client=True) as client:
        of_run = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        told = {artifact.key: artifact for artifact in client.read_artifacts(flow_run_filter=of_run)}
        tasks = {task.id: task.name for task in client.read_task_runs(flow_run_filter=of_run)}
    assert "| whole_parameters " in told["finercut-prune"].data
    assert "| finercut_copying | acc " in told["finercut-evaluate"].data
    progress = told["finercut-prune-progress"]
    assert (progress.type, progress.data) == ("progress", 100.0)
    for artifact in (told["finercut-prune"], progress):
        assert tasks[artifact.task_run_id] == f"prune: {flow_run.name}"
    assert "reports/report.html" in told["finercut-summary"].data


def test_a_second_execution_runs_nothing_logs_every_figure_again_and_makes_no_version_but_a_challenger(executed):
    toy, first = executed
    client = mlflow.MlflowClient()
    client.delete_registered_model_alias(toy["register"]["name"], "challenger")
    second = compress()
    assert (second.status, second.version) == ("already registered", first.version)
    challenger = client.get_model_version_by_alias(toy["register"]["name"], "challenger")
    assert str(challenger.version) == first.version

    run = runs(toy["flow"]["experiment"])[0]
    assert run.info.run_id == second.run_id != first.run_id
    assert {name: run.data.tags[f"stage.{name}"] for name in STAGES} == dict.fromkeys(STAGES, "cached")
    assert run.data.metrics["throughput/speed_up"] == 1.25
    history = client.get_metric_history(run.info.run_id, "curve/held_out_divergence")
    assert [(m.step, m.value) for m in history] == [(1, 0.1), (2, 0.375)]


def written_by_another_version(**changes):
    """reports/evaluate.json changed (None: without the field), and DVC's cache with it."""
    path = Path("reports/evaluate.json")
    content = json.loads(path.read_text()) | changes
    path.unlink()  # a link into the cache
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    subprocess.run([sys.executable, "-m", "dvc", "commit", "--quiet", "--force", "evaluate"], check=True)


def test_a_cached_report_that_lacks_what_this_version_needs_is_made_again(executed):
    toy, _ = executed
    written_by_another_version(whole_perplexity=None)
    assert compress().status == "already registered"
    run = runs(toy["flow"]["experiment"])[0]
    assert {name: run.data.tags[f"stage.{name}"] for name in STAGES} == {
        "prune": "cached",
        "evaluate": "ran",
        "throughput": "cached",
    }


def test_a_cached_report_with_a_field_of_a_later_version_is_read(executed):
    toy, _ = executed
    written_by_another_version(from_the_future=1)
    assert compress().status == "already registered"
    run = runs(toy["flow"]["experiment"])[0]
    assert {name: run.data.tags[f"stage.{name}"] for name in STAGES} == dict.fromkeys(STAGES, "cached")


def test_a_stage_whose_local_source_was_edited_is_to_run_again(tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "mine")
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["fetch"]["source"] = {"kind": "local", "path": "mine"}
    settings = Params.model_validate(values)
    fetch, prune = dag.Stage("fetch", ()), dag.Stage("prune", ())
    assert not _edited(fetch, settings)  # it has never run
    paths.REPORTS.mkdir()
    taken = {"revision": revisions.current(settings.fetch.source)}
    example_reports.fetch().model_copy(update=taken).write(paths.report("fetch"))
    assert not _edited(fetch, settings)
    with Path("mine/tokenizer.json").open("a") as file:
        file.write(" ")
    assert _edited(fetch, settings)
    assert not _edited(prune, settings)
    shutil.rmtree("mine")  # what is not there was not edited: DVC's cache has what was taken
    assert not _edited(fetch, settings)


def task_runs(run):
    """Of a run of MLflow: its flow run in Prefect, and the states of its tasks."""
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(run.data.tags["prefect.flow_run_id"])
        tasks = [t for t in client.read_task_runs() if t.flow_run_id == flow_run.id]
        return flow_run, {t.name.partition(":")[0]: t.state.name for t in tasks}


def leave_searches(n):
    """As many as `n` searches would, the oldest first."""
    for number in range(n):
        trajectory = paths.WORK / "search" / str(number) / "trajectory.jsonl"
        trajectory.parent.mkdir(parents=True)
        trajectory.write_text("1234567")
        os.utime(trajectory, (number, number))


def assert_collected(run):
    """That a flow which began with `leave_searches(4)` has freed the disk of the oldest one."""
    assert {path.name for path in (paths.WORK / "search").iterdir()} == {"1", "2", "3"}
    assert run.data.tags["collect"] == "freed 7 bytes"
    assert task_runs(run)[1]["collect"] == "Completed"


def test_a_model_that_fails_the_gate_is_recorded_with_the_reason_and_not_registered(toy):
    leave_searches(4)
    Path("speed_up.txt").write_text("0.9")
    with pytest.raises(register.Refused, match=r"not registered: speed_up is 0\.9; at least 1 is required"):
        compress(collect=True)
    report = RegisterReport.read(Path("reports/register.json"))
    assert (report.status, report.version) == ("refused", None)
    (run,) = runs(toy["flow"]["experiment"])
    assert run.info.status == "FAILED"
    assert run.data.tags["gate"] == "refused"
    assert "speed_up is 0.9" in run.data.tags["failure"]
    assert run.data.metrics["throughput/speed_up"] == 0.9
    assert mlflow.MlflowClient().search_model_versions(f"name = '{toy['register']['name']}'") == []
    assert_collected(run)


def test_a_failed_stage_is_named_with_its_last_line_and_nothing_runs_after_it(toy):
    broken = {**STAGES["evaluate"], "cmd": "echo working; echo finercut evaluate: parity is 0.5, too much >&2; exit 1"}
    write(stages=STAGES | {"evaluate": broken})
    leave_searches(4)
    with pytest.raises(RuntimeError, match=r"^evaluate: finercut evaluate: parity is 0\.5, too much$"):
        compress(collect=True)
    assert not Path("reports/throughput.json").exists()
    (run,) = runs(toy["flow"]["experiment"])
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"] == "evaluate: finercut evaluate: parity is 0.5, too much"
    log = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="log.txt")).read_text()
    assert "prune: toy stage model done" in log
    assert "evaluate: working" in log
    flow_run, states = task_runs(run)
    assert flow_run.state.is_failed()
    assert "evaluate: finercut evaluate: parity is 0.5, too much" in flow_run.state.message
    assert states == {"prune": "Completed", "evaluate": "Failed", "collect": "Completed"}
    assert_collected(run)


def test_a_stage_is_tried_again_as_often_as_params_say(toy):
    leave_searches(4)
    flaky = "test -e tried && exit 0; touch tried; exit 1"
    toy["flow"] |= {"retries": {"fetch": 1}, "retry_delay_s": 0}
    write(settings=toy, stages=STAGES | {"fetch": {"cmd": flaky, "deps": ["reports/throughput.json"]}})
    assert compress(collect=True).status == "registered"
    (run,) = runs(toy["flow"]["experiment"])
    assert run.info.status == "FINISHED"
    assert_collected(run)


def test_a_stage_that_takes_too_long_is_stopped_with_all_its_processes(toy):
    toy["flow"]["timeout_s"] = {"evaluate": 4}
    # the shell waits for a child that would outlive it
    write(settings=toy, stages=STAGES | {"evaluate": {**STAGES["evaluate"], "cmd": "sleep 3141.5 & sleep 3141.5"}})
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^evaluate: stopped after 4 s, the limit in flow\.timeout_s$"):
        compress()
    assert time.monotonic() - started < 60
    assert gone("3141.5", within_s=0)


def test_a_disk_that_cannot_be_freed_leaves_the_run_registered_and_is_told(executed):
    toy, _ = executed
    leave_searches(4)
    oldest = paths.WORK / "search" / "0"
    oldest.rename("elsewhere")
    oldest.symlink_to(Path("elsewhere").absolute())  # no folder to delete
    assert compress(collect=True).status == "already registered"
    oldest.unlink()
    run = runs(toy["flow"]["experiment"])[0]
    assert run.info.status == "FINISHED"
    assert run.data.tags["collect"].startswith("failed: ")
    flow_run, states = task_runs(run)
    assert (flow_run.state.name, states["register"], states["collect"]) == ("Completed", "Completed", "Failed")


def test_an_execution_holds_the_workspace_for_itself_and_its_stages(toy):
    command = f"{sys.executable} -m pipelines.cli prune"
    tries = f"{command} 2>inside; env -u {HELD_BY} {command} 2>outside; {STAGES['evaluate']['cmd']}"
    write(stages=STAGES | {"evaluate": {**STAGES["evaluate"], "cmd": tries}})
    assert compress().status == "registered"
    assert "run `finercut fetch` first" in Path("inside").read_text()
    works = f"process {os.getpid()} works in {Path.cwd()}: wait until it has ended, or end it"
    assert Path("outside").read_text() == f"finercut prune: {works}\n"
    with holding() as other, pytest.raises(RuntimeError, match=rf"^process {other.pid} works in "):
        compress()
    assert len(runs(toy["flow"]["experiment"])) == 1, "nothing was begun"


def test_a_checkpoint_that_was_collected_is_a_new_version_when_it_is_made_again(executed):
    _, first = executed
    book = Ledger(mlflow.MlflowClient(), first.name)
    assert book.append(book.read(), "collected", first.version, first.run_id)
    second = compress()
    assert (second.status, second.version) == ("registered", "2")


def as_in_a_terminal():
    """These tests may run behind `nohup` or `&`, which have signals ignored, by what they start too."""
    for sent in (signal.SIGINT, signal.SIGHUP):
        signal.signal(sent, signal.SIG_DFL)


# A supervisor and a worker send the first, a terminal that closes the second.
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_cancelling_stops_the_stage_and_closes_both_runs(toy, prefect_server, sent):
    write(stages=STAGES | {"evaluate": {**STAGES["evaluate"], "cmd": "sleep 2236.07 & sleep 2236.07"}})
    environment = os.environ | {"PREFECT_API_URL": prefect_server}
    execution = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "run"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=as_in_a_terminal,
    )
    deadline = time.monotonic() + 90
    while not processes_with("2236.07") and execution.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    execution.send_signal(sent)
    _, said = execution.communicate(timeout=60)
    assert execution.returncode != 0, said.decode()
    assert gone("2236.07")
    (run,) = runs(toy["flow"]["experiment"])
    assert run.info.status == "KILLED"
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(UUID(run.data.tags["prefect.flow_run_id"])).state.name == "Crashed"


def test_ctrl_c_in_a_terminal_is_recorded_by_the_server_that_prefect_started(toy, monkeypatch, tmp_path):
    write(stages=STAGES | {"evaluate": {**STAGES["evaluate"], "cmd": "sleep 2236.07"}})
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    execution = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C is for a group
        preexec_fn=as_in_a_terminal,
    )
    deadline = time.monotonic() + 120
    while not processes_with("2236.07") and execution.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(execution.pid, signal.SIGINT)
    said, _ = execution.communicate(timeout=60)
    assert gone("2236.07")
    assert execution.returncode == 1
    assert "Finished in state Crashed" in said
    assert "unexpected" not in said
    (run,) = runs(toy["flow"]["experiment"])
    assert run.info.status == "KILLED"


def test_a_version_whose_files_are_lost_is_made_anew(executed):
    _, first = executed
    client = mlflow.MlflowClient()
    before = versions.every(client, first.name)
    for version in before:
        versions.stored(client, version).delete()
    anew = register.run(load())
    assert (anew.status, int(anew.version)) == ("registered", int(before[0].version) + 1)


def test_registering_alone_records_the_stages_and_takes_nothing_that_is_not_of_dvc_lock(executed):
    toy, first = executed
    report = register.run(load())
    run = runs(toy["flow"]["experiment"])[0]
    assert run.info.run_id == report.run_id != first.run_id
    assert (report.status, run.info.status) == ("already registered", "FINISHED")
    assert run.data.metrics["evaluate/mean_retention"] == 0.75
    before = Path("speed_up.txt").read_text()
    Path("speed_up.txt").write_text("2.5")
    with pytest.raises(RuntimeError, match=r"not reproduced since something changed: throughput; run `finercut run`"):
        register.run(load())
    Path("speed_up.txt").write_text(before)


def test_a_repository_without_a_commit_says_what_to_do(toy):
    shutil.rmtree(".git")
    subprocess.run(["git", "init", "-q"], check=True)
    with pytest.raises(RuntimeError, match="git has no commit here, .*: commit the project first"):
        dag.revision()


def test_outside_a_repository_the_flow_says_where_to_be(tmp_path, monkeypatch, mlflow_store):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    with pytest.raises(RuntimeError, match=r"^DVC: .*run from the root of a clone of the project$"):
        compress()


def test_lines_arrive_while_the_process_runs():
    arrived = []
    run_group(
        ["sh", "-c", "echo one; sleep 1; echo two"],
        os.environ,
        None,
        lambda line: arrived.append((line, time.monotonic())),
    )
    assert [line for line, _ in arrived] == ["one", "two"]
    assert arrived[1][1] - arrived[0][1] > 0.8


def test_a_process_that_outlives_its_leader_is_ended():
    assert run_group(["sh", "-c", "sleep 1618.03 & exit 3"], os.environ, None, print) == 3
    assert gone("1618.03", within_s=0)


def test_a_command_ends_with_all_it_started_when_its_starter_is_killed():
    start = "import os; from pipelines.flow import run_group; run_group({!r}, os.environ, None, print)"
    command = ["sh", "-c", "sleep 1414.2 & sleep 1414.2"]
    starter = subprocess.Popen(
        [sys.executable, "-c", start.format(command)], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 120
    while len([p for p in processes_with("1414.2") if p.name() == "sleep"]) < 2 and time.monotonic() < deadline:
        assert starter.poll() is None
        time.sleep(0.1)
    starter.kill()
    starter.wait()
    assert gone("1414.2")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit(1)])
def test_a_command_whose_lines_cannot_be_kept_still_runs_to_its_end(tmp_path, error):
    kept = []

    def keep(line):
        kept.append(line)
        raise error

    # More than a pipe holds.
    command = ["sh", "-c", f"yes finercut | head -c 300000; touch {tmp_path}/done; exit 3"]
    assert run_group(command, os.environ, 60, keep) == 3
    assert (tmp_path / "done").exists()
    assert kept == ["finercut"]


def test_whoever_interrupts_the_end_of_a_group_has_it_killed_at_once(monkeypatch):
    process = start_group(["sh", "-c", "trap '' TERM; echo on; while :; do sleep 0.1; done"], os.environ)
    assert process.stdout.readline() == "on\n"

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("finercut.system.processes.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        end_group(process)
    monkeypatch.undo()
    process.wait(10)
    assert process.stdout.read() == ""  # nobody has the pipe any more
    process.stdin.close()
    process.stdout.close()
