"""The deployment on a real Prefect server with a real worker: a schedule's runs, their order, alerts, cancelling.

Runs take many seconds to start, so each test proves several claims on few of them. The stages are toys.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import servers
import yaml
from click.testing import CliRunner
from prefect.automations import AutomationCore
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelling
from scheduled_runs import Expected, Planned, Site, follow, schedule
from test_flow import gone, processes_with, runs
from toy import ROOT, STAGES, make_toy

from pipelines.cli import main

pytestmark = pytest.mark.timeout(1200)
PATIENCE_S = 400
POOL = "finercut"
# What the toy stage `evaluate` does first: wait, hang with a child that would outlive it, or fail, as a test wants.
GATE = """
while test -e hold; do sleep 0.2; done
if test -e hang; then sleep 2718.28 & sleep 2718.28; fi
if test -e broken; then echo finercut evaluate: broken on purpose >&2; exit 1; fi
"""


@pytest.fixture(scope="module")
def alerts():
    """Everything posted to an address of ours, and that address."""
    posted: list[dict] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield posted, f"http://127.0.0.1:{server.server_port}/hook?token=canary"
    server.shutdown()


@pytest.fixture(scope="module")
def health():
    """Where the worker answers whether it is well."""
    return f"http://127.0.0.1:{servers.free_port()}/health"


@pytest.fixture(scope="module")
def site(tmp_path_factory, s3_store):
    root = tmp_path_factory.mktemp("scheduled")
    return Site(root, tmp_path_factory.mktemp("worker"), s3_store, f"{root.name}-soak", shared_memory=False)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, prefect_server, mlflow_server, alerts, health, site):
    """A clone of toy stages with two deployments on it, one of which skips what overlaps, and a worker."""
    root = site.workspace
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("worker-home")))
        document = yaml.safe_load((ROOT / "prefect.yaml").read_text())
        (nightly,) = document["deployments"]
        skipping = nightly | {"name": "skipping", "schedules": []}
        skipping["concurrency_limit"] = {"limit": 1, "collision_strategy": "CANCEL_NEW"}
        Path("prefect.yaml").write_text(yaml.safe_dump(document | {"deployments": [nightly, skipping]}))
        Path("params").mkdir()
        Path("gate.sh").write_text(GATE)
        Path("params/other.yaml").write_text((ROOT / "params.yaml").read_text())
        gated = STAGES["evaluate"] | {"cmd": f"sh gate.sh && {STAGES['evaluate']['cmd']}", "params": ["evaluate.seed"]}
        another = "grep -o 'error_probability: [0-9.]*' params.yaml >> artifacts/quantised/model.safetensors"
        prune = STAGES["prune"] | {"cmd": f"{STAGES['prune']['cmd']} && {another}"}
        throughput = STAGES["throughput"] | {"deps": [*STAGES["throughput"]["deps"], "artifacts/quantised"]}
        settings = make_toy({"prune": prune, "evaluate": gated, "throughput": throughput})
        said = [deploy(alerts[1]) for _ in range(2)]
        assert [done.exit_code for done in said] == [0, 0], said[0].output
        assert said[0].stdout == said[1].stdout != ""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--install-policy", "never"]
        command.append("--with-healthcheck")
        environment = os.environ | site.environment
        environment |= {
            "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",  # as in the Dockerfile
            "PREFECT_WORKER_WEBSERVER_PORT": str(urlsplit(health).port),
        }
        log = tmp_path_factory.mktemp("worker-log") / "log"
        with servers.running(command, log, servers.answers(health), env=environment):
            yield settings["flow"]["experiment"]


def deploy(webhook):
    return CliRunner().invoke(main, ["deploy"], env={"FINERCUT_WEBHOOK": webhook})


def start(name, **parameters):
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(f"finercut/{name}")
        return client.create_flow_run_from_deployment(found.id, parameters=parameters).id


def state(run_id):
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id).state


def eventually(what, within_s=PATIENCE_S):
    deadline = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
    return found


def ended(run_id):
    return eventually(lambda: (found := state(run_id)).is_final() and found)


def test_everything_is_declared_once_however_often_it_is_deployed(deployed):
    with get_client(sync_client=True) as client:
        (schedule,) = client.read_deployment_by_name("finercut/nightly").schedules
        assert (schedule.schedule.cron, schedule.schedule.timezone) == ("0 2 * * *", "UTC")
        assert client.read_work_pool(POOL).type == "process"
        assert client.read_global_concurrency_limit_by_name("finercut-accelerator-0").limit == 1
        for name in ("finercut: a run failed, crashed or is late", "finercut: a run that went silent has crashed"):
            assert len(client.read_automations_by_name(name)) == 1


def test_the_worker_passes_the_images_health_check_and_listens_to_this_machine_alone(deployed, health):
    assert subprocess.run([ROOT / "docker/healthy", health], check=False).returncode == 0
    (worker,) = [p for p in processes_with("--with-healthcheck") if health_port(p) == urlsplit(health).port]
    assert servers.open_to_others(worker) == []


def health_port(process):
    return int(process.environ().get("PREFECT_WORKER_WEBSERVER_PORT", 0))


def test_the_form_offers_the_params_files_and_refuses_anything_else(deployed):
    with get_client(sync_client=True) as client:
        schema = client.read_deployment_by_name("finercut/nightly").parameter_openapi_schema
    assert schema["properties"]["params_file"]["anyOf"][0]["enum"] == ["params.yaml", "params/other.yaml"]
    for wrong in ({"params_file": "params/secret.yaml"}, {"push": "often"}, {"overrides": 3}, {"typo": True}):
        with pytest.raises(PrefectHTTPStatusError, match=next(iter(wrong))):
            start("nightly", **wrong)


def test_a_parameter_that_does_not_exist_is_named_before_anything_is_declared(deployed, alerts):
    before = Path("prefect.yaml").read_text()
    document = yaml.safe_load(before)
    document["deployments"][0]["schedules"][0]["parameters"] = {"typo": True}
    Path("prefect.yaml").write_text(yaml.safe_dump(document))
    try:
        said = deploy(alerts[1])
    finally:
        Path("prefect.yaml").write_text(before)
    told = "finercut deploy: prefect.yaml: deployment nightly: no parameter typo; there are params_file, overrides, "
    assert (said.exit_code, said.stderr.startswith(told)) == (1, True), said.stderr


def test_runs_that_overlap_wait_or_are_skipped_and_share_an_accelerator(deployed):
    hold = Path("hold")
    hold.touch()
    first = start(
        "nightly", params_file="params/other.yaml", overrides={"evaluate.seed": 7, "flow.experiment": deployed}
    )
    eventually(lambda: processes_with("gate.sh"))
    waiting = start("nightly")
    elsewhere = start("skipping")
    eventually(lambda: state(waiting).name == "AwaitingConcurrencySlot" and state(elsewhere).is_running())
    skipped = start("skipping")
    assert ended(skipped).is_cancelled()
    assert len(runs(deployed)) == 1  # the accelerator is taken: nobody else has begun
    assert not state(waiting).is_running()
    hold.unlink()
    assert [ended(run_id).is_completed() for run_id in (first, waiting, elsewhere)] == [True] * 3

    oldest, *later = sorted(runs(deployed), key=lambda run: run.info.start_time)
    assert oldest.data.params["evaluate.seed"] == "7"
    # what one run overrode, the next does not inherit
    assert [run.data.params["evaluate.seed"] for run in later] == ["1234", "1234"]
    ends = [run.info.end_time for run in (oldest, *later)]
    assert all(end <= run.info.start_time for end, run in zip(ends, later, strict=False))


def test_cancelling_stops_the_stage_and_the_next_run_goes_on_from_there(deployed):
    Path("hang").touch()
    run_id = start("nightly", overrides={"evaluate.seed": 8})
    eventually(lambda: processes_with("2718.28"))
    Path("hang").unlink()
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Cancelling())  # the button in the UI
    assert gone("2718.28")
    assert ended(run_id).is_cancelled()
    newest = runs(deployed)[0]
    assert newest.info.status == "KILLED"
    assert "collect" not in newest.data.tags  # which would have kept its user waiting

    assert ended(start("nightly", overrides={"evaluate.seed": 8})).is_completed()
    newest = runs(deployed)[0]
    assert [newest.data.tags[f"stage.{name}"] for name in STAGES] == ["cached", "ran", "cached"]


def test_a_late_run_and_a_failed_one_raise_an_alert_without_secrets(deployed, alerts):
    posted, address = alerts

    def pause(paused):
        with get_client(sync_client=True) as client:
            client.update_work_pool(POOL, WorkPoolUpdate(is_paused=paused))

    def alert_for(run_id, state_name):
        with get_client(sync_client=True) as client:
            text = f"finercut: {client.read_flow_run(run_id).name} is {state_name}"
        return eventually(lambda: [alert for alert in posted if alert["text"] == text])

    pause(True)
    Path("broken").touch()
    run_id = start("nightly", overrides={"evaluate.seed": 9})
    (late,) = alert_for(run_id, "Late")
    assert late["deployment"] == "nightly"
    assert late["url"].endswith(str(run_id))
    pause(False)
    found = ended(run_id)
    assert found.is_failed()
    assert "evaluate: finercut evaluate: broken on purpose" in found.message
    assert len(alert_for(run_id, "Failed")) == 1
    Path("broken").unlink()
    assert not [alert for alert in posted if "Cancelled" in alert["text"] or "Completed" in alert["text"]]
    with get_client(sync_client=True) as client:
        shown = client.read_block_document_by_name("finercut-alerts", "webhook", include_secrets=False)
    assert address not in str(shown.data)


@pytest.fixture
def soon_silent(deployed):
    """A run counts as silent after less than it lets pass between heartbeats otherwise; so only in one test."""
    with get_client(sync_client=True) as client:
        (automation,) = client.read_automations_by_name("finercut: a run that went silent has crashed")
        declared = AutomationCore(**automation.model_dump(exclude={"id", "owner_resource"}))
        soon = declared.model_copy(deep=True)
        soon.trigger.within = timedelta(seconds=45)
        client.update_automation(automation.id, soon)
        yield
        client.update_automation(automation.id, declared)


def test_a_run_that_is_killed_with_its_machine_is_called_crashed(soon_silent, alerts):
    Path("hang").touch()
    # No worker, which would notice.
    run = "from pipelines.flow import compress; compress('params/other.yaml', overrides={'evaluate.seed': 10})"
    environment = os.environ | {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    process = subprocess.Popen([sys.executable, "-c", run], env=environment, start_new_session=True)
    eventually(lambda: processes_with("2718.28") or process.poll() is not None)
    assert process.poll() is None, "it ended by itself"
    Path("hang").unlink()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert gone("2718.28")
    with get_client(sync_client=True) as client:
        (run_id,) = [run.id for run in client.read_flow_runs() if run.state.is_running()]
    found = ended(run_id)
    assert (found.is_crashed(), found.message) == (True, "its machine went silent")
    posted, _ = alerts
    eventually(lambda: [alert for alert in posted if alert["url"].endswith(str(run_id))])


# `make soak` is the same with two dozen runs.
@pytest.mark.matrix
def test_what_a_schedule_starts_leaves_correct_records_no_process_and_bounded_disk(deployed, site):
    named = {"register.name": site.name, "flow.experiment": site.name, "collect.versions": 1}

    def run(error_probability, ending="registered", **others):
        return Planned({"search.error_probability": error_probability}, named | others, ending)

    plan = [run(0.06), run(0.07), run(0.07, "evaluate", **{"flow.timeout_s.evaluate": 0.01})]
    expected = Expected({"search.error_probability": STAGES}, list(STAGES), n_kept=1)
    done = list(follow(site, schedule(plan, in_s=20), expected))
    assert [run.wrong + run.orphans + run.files for run in done] == [[]] * 3
    # Any of them may have been first; of two versions the older one's has gone.
    assert len({run.disk.checkpoints for run in done} - {0}) == 1
