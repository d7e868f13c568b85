"""The Prefect flow: every stage of `dvc.yaml` through DVC, then registration, recorded as one MLflow run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from finercut import registry
from finercut.params import Params, load
from finercut.processes import GRACE_S, end_group
from finercut.redaction import redacted
from finercut.reports import RegisterReport
from pipelines import dag, register, summary

# DVC's advice after every stage, which is for people who run it by hand.
DVC_HINTS = ("To track the changes", "git add dvc.lock", "To enable auto staging", "dvc config core", "Use `dvc push`")


@flow(name="finercut")
def compress(pull: bool = False) -> RegisterReport:
    """Compress the model `params.yaml` names, in the current directory, and register the result.

    Stages run one at a time, in DVC's order: two on one accelerator would fight for it and falsify the throughput.

    Args:
        pull: take what is missing from the DVC remote instead of computing it

    Raises:
        RuntimeError: a stage failed; the message is its name and its last line.
        register.Refused: the pruned model did not pass the gate.
    """
    params = load()
    stages = dag.stages()
    mlflow_run = registry.open_run(
        params.flow.experiment,
        params.model_dump(mode="json", by_alias=True),
        dag.revision() | {"prefect.flow_run_id": str(FlowRunContext.get().flow_run.id)},
    )
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "log.txt"
        with registry.recorded(mlflow_run, log_file):
            _link(mlflow_run)
            for stage in stages:
                _reproduce.with_options(
                    name=stage.name,
                    retries=params.flow.retries.get(stage.name, 0),
                    retry_delay_seconds=params.flow.retry_delay_s,
                )(stage, mlflow_run, params.flow.timeout_s.get(stage.name), pull, log_file)
            for path in register.PIPELINE_FILES:
                mlflow_run.log_file(path, "pipeline")
            return _register_task(params, mlflow_run)


# DVC is the cache. Prefect's own timeouts cannot interrupt a thread that waits for a process, so the deadline is ours.
@task(task_run_name="{stage.name}", cache_policy=NO_CACHE, persist_result=False)
def _reproduce(stage: dag.Stage, mlflow_run: registry.Run, timeout_s: float | None, pull: bool, log_file: Path) -> None:
    """Reproduce one stage and log its reports, whether it ran or came from DVC's cache."""
    logger = get_run_logger()
    lines: list[str] = []

    def keep(line: str) -> None:
        if line.strip().startswith(DVC_HINTS):
            return
        line = redacted(line)
        logger.info(line)
        lines.append(line)
        with log_file.open("a", encoding="utf-8") as file:
            file.write(f"{stage.name}: {line}\n")

    started = time.monotonic()
    try:
        code = run_group(_dvc_command(stage.name, pull), _environment(mlflow_run), timeout_s, keep)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{stage.name}: stopped after {timeout_s:g} s, the limit in flow.timeout_s") from error
    if code:
        raise RuntimeError(f"{stage.name}: {_reason(lines)}")
    ran = any(line.startswith("Running stage") for line in lines)
    mlflow_run.log_tags({f"stage.{stage.name}": "ran" if ran else "cached"})
    mlflow_run.log_metrics({f"stage/{stage.name}_s": time.monotonic() - started})
    mlflow_run.log_reports(stage.reports)


def _dvc_command(stage: str, pull: bool) -> list[str]:
    options = ["--single-item", *(["--pull"] if pull else [])]
    return [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *options, stage]


def _environment(mlflow_run: registry.Run) -> dict[str, str]:
    """For a stage: this interpreter's commands first, the run to add to, and no long waits for a lost server."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_TRACKING_URI": registry.tracking_uri(),
        "MLFLOW_RUN_ID": mlflow_run.run_id,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }


def _reason(lines: list[str]) -> str:
    """The stage's own last line; DVC's, which only say that it failed, if there is none."""
    told = [line for line in lines if not line.startswith(("ERROR: failed to reproduce", "> ", "Running stage"))]
    last = (told or lines or ["no output"])[-1]
    return last.removeprefix("ERROR: ")


def run_group(
    command: list[str], environment: Mapping[str, str], timeout_s: float | None, on_line: Callable[[str], None]
) -> int:
    """Run `command` in a process group of its own, passing on its lines as they come; nothing of it outlives the call.

    DVC starts the stage, and vLLM its engine: signalling DVC alone would leave them with the accelerator.

    Raises:
        subprocess.TimeoutExpired: after `timeout_s`, the group being gone.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def pump() -> None:
        for line in process.stdout:
            if line.strip():
                on_line(line.rstrip())

    reader = threading.Thread(target=pump, daemon=True)
    try:
        reader.start()
        return process.wait(timeout_s)
    finally:
        end_group(process)
        reader.join(GRACE_S)


@task(name="register", task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
def _register_task(params: Params, mlflow_run: registry.Run) -> RegisterReport:
    try:
        report = register.run(params, mlflow_run)
    except register.Refused:
        _publish_summary()
        raise
    _publish_summary()
    return report


def _publish_summary() -> None:
    create_markdown_artifact(summary.markdown(), key="finercut-summary", description="What this execution came to")


def _link(mlflow_run: registry.Run) -> None:
    """The MLflow run, one click away; a local store has no page to link to."""
    uri = registry.without_credentials(registry.tracking_uri())
    if uri.startswith(("http://", "https://")):
        page = f"{uri.rstrip('/')}/#/experiments/{mlflow_run.experiment_id}/runs/{mlflow_run.run_id}"
        create_link_artifact(page, link_text="MLflow run", key="finercut-mlflow-run")
