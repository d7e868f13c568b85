"""The Prefect flow: every stage of `dvc.yaml` through DVC, registration, collection, recorded as one MLflow run."""

from __future__ import annotations

import contextvars
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from uuid import UUID

import httpx
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.runtime import deployment
from pydantic import JsonValue

from finercut.registry import runs, server
from finercut.registry.records import Check, RegisterReport
from finercut.report.frontier import Rule
from finercut.selection.settings import Unit
from finercut.system.machine import prepare
from finercut.system.processes import GRACE_S, end_group, start_group
from finercut.system.redaction import redacted
from finercut.system.staging import exclusive

from . import collect as collection
from . import dag, frontier, paths, register, reports, settings, summary
from .params import Params, load

logger = logging.getLogger("finercut")

# How far a stage is, in lines it prints: `search: 3/15 removed ...`, `heal: step 3/12, ...`.
PROGRESS = re.compile(r"\w+: (?:step )?(\d+)/(\d+)\b")
# A Prefect server that does not answer costs an artifact, and not the hours of the stage.
UNTOLD = (httpx.HTTPError, PrefectException, RuntimeError)
# DVC's advice after every stage, which is for people who run it by hand.
DVC_HINTS = ("To track the changes", "git add dvc.lock", "To enable auto staging", "dvc config core", "Use `dvc push`")
DVC_SUPPORT = "Having any troubles?"  # after an error that DVC did not expect


@flow(name="finercut")
def compress(
    params_file: settings.ParamsFile | None = None,
    overrides: dict[str, JsonValue] | None = None,
    pull: bool = False,
    push: bool = False,
    collect: bool = False,
    accelerator: str | None = None,
    budgets: list[float] | None = None,
    unit: Unit | None = None,
    rule: Rule = "leanest",
) -> RegisterReport:
    """Compress the model `params.yaml` names, in the current directory, and register the result.

    Stages run one at a time, in DVC's order: two on one accelerator would fight for it and falsify the throughput. The
    execution holds the workspace from the choice of params to the collection.

    Args:
        params_file: The settings, as they are in the last commit. None: params.yaml as it lies in the workspace.
        overrides: Fields of the params file to change for this run, such as {"prune.budget.amount": 0.3}.
        pull: Take results from the DVC remote where it has them, instead of computing them.
        push: Store every result in the DVC remote before the model is registered.
        collect: At the end, free the disk of what the section collect of params.yaml does not keep.
        accelerator: The Prefect concurrency limit to hold, so that one run at a time uses the accelerator.
        budgets: Compress to each of these in place of prune.budget, and register one that passes the gate.
        unit: Of the budgets. None: the unit of prune.budget.
        rule: Which budget of those that pass is registered. leanest: the one that saves most. best: the one that keeps
            most accuracy.

    Raises:
        ValueError: an override of no params_file, or of a field that does not exist or does not allow it.
        RuntimeError: a stage failed (the message is its name and its last line), or another process works in this
            workspace.
        register.Refused: the pruned model did not pass the gate.
    """
    prepare()  # a worker's execution does not come by the command line
    # A run of hours must not die because the server was restarted and a lease came late.
    slot = concurrency([accelerator] if accelerator else [], strict=True, raise_on_lease_renewal_failure=False)
    # First the slot: a run of another deployment, which waits for it, must not find the workspace taken.
    with slot, exclusive(paths.WORK):
        if params_file:
            settings.take_committed(params_file, overrides or {})
        elif overrides:
            raise ValueError("overrides need a params_file to start from")
        for wanted, purpose in ((push, "push to"), (pull, "pull from")):
            if wanted:
                dag.remote(purpose)
        if not budgets:
            params = load()
            _name(params.title)
            return _execute(params, pull, push, collect, {})[0]
        return frontier.run(
            budgets,
            unit,
            rule,
            params_file,
            overrides or {},
            _name,
            # What one point leaves, the next may need: it is collected when all have ended.
            lambda params, tags, registers, others=(): _execute(params, pull, push, False, tags, registers, others),
            lambda params, mlflow_run: _collecting(params, mlflow_run) if collect else nullcontext(),
        )


def _name(title: str) -> None:
    """Of this flow run, in Prefect."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(FlowRunContext.get().flow_run.id, name=title)


def _execute(
    params: Params,
    pull: bool,
    push: bool,
    collect: bool,
    tags: Mapping[str, str],
    registers: bool = True,
    others: Sequence[Params] = (),
) -> tuple[RegisterReport | None, list[Check], str]:
    """Every stage, and the registration where it `registers`.

    Args:
        others: with budgets that are to be reached after this one: none is searched for if one of them cannot be.

    Returns:
        The registration, the gate's checks, and the id of the MLflow run, which has `tags`.
    """
    stages = dag.stages()
    tags = {"prefect.flow_run_id": str(FlowRunContext.get().flow_run.id), **tags}
    if deployment.id:
        tags |= {"mlflow.source.name": f"{compress.name}/{deployment.name}", "mlflow.source.type": "JOB"}
    command = "finercut frontier" if MLFLOW_PARENT_RUN_ID in tags else "finercut run"
    mlflow_run = register.open_run(params, tags, command)
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "log.txt"
        with (
            runs.recorded(mlflow_run, log_file),
            _collecting(params, mlflow_run) if collect else nullcontext(),
        ):
            _link(mlflow_run)
            for stage in stages:
                if stage.name == "search" and others:
                    _check_reach(others)
                _reproduce.with_options(
                    name=stage.name,
                    task_run_name=f"{stage.name}: {params.title}",
                    retries=params.flow.retries.get(stage.name, 0),
                    retry_delay_seconds=params.flow.retry_delay_s,
                )(stage, mlflow_run, params.flow.timeout_s.get(stage.name), pull, log_file, _edited(stage, params))
                if stage.name == "fetch" and paths.MODEL.is_dir():
                    _foresee(params)
            for path in register.PIPELINE_FILES:
                mlflow_run.log_file(path, "pipeline")
            if push:
                _push(mlflow_run, log_file)
            if not registers:
                return None, _gate(params, mlflow_run), mlflow_run.run_id
            report = _register_task(params, mlflow_run)
            return report, report.checks, mlflow_run.run_id


def _foresee(params: Params) -> None:
    """
    Raises:
        ValueError: settings of later stages do not fit the model.
        RuntimeError: a later stage cannot finish on this machine.
    """
    from finercut.model.directory import ModelDirectory

    from . import foresight

    if obstacles := foresight.check(params, ModelDirectory(paths.MODEL)):
        raise RuntimeError("; ".join(obstacles))


def _check_reach(others: Sequence[Params]) -> None:
    """
    Raises:
        ValueError: a budget is more than all candidates come to, or less than any.
    """
    from .search_job import inputs

    for params in others:
        inputs(params.search.model_copy(update={"removals": "auto"}), params.prune.budget)


def _gate(params: Params, mlflow_run: runs.Run) -> list[Check]:
    checks = register.judge(params)
    register.conclude(checks, mlflow_run)
    _publish(summary.result(checks), mlflow_run)
    return checks


def _edited(stage: dag.Stage, params: Params) -> bool:
    """Whether the files behind a local source are not those that the stage took: DVC knows their path alone."""
    if stage.name == "search" and params.search.task is None:
        return False
    local = stage.name in ("fetch", "calibrate", "search")
    return local and import_module(f"{__package__}.{stage.name}").is_stale(params)


# DVC is the cache. Prefect's own timeouts cannot interrupt a thread that waits for a process, so the deadline is ours.
@task(cache_policy=NO_CACHE, persist_result=False)
def _reproduce(
    stage: dag.Stage, mlflow_run: runs.Run, timeout_s: float | None, pull: bool, log_file: Path, edited: bool
) -> None:
    """Reproduce one stage and log its reports, whether it ran or came from DVC's cache.

    It runs in any case where its source was edited, or where another version left a report that this one cannot read.
    """
    started = time.monotonic()
    options = ["--single-item", *(["--pull"] if pull else [])]
    if edited:
        get_run_logger().info("%s: its source has changed since", stage.name)
    progress = _Progress(stage.name)
    try:
        force = ["--force"] if edited else []
        lines = _dvc(stage.name, ["repro", *options, *force, stage.name], mlflow_run, timeout_s, log_file, progress)
        if reason := reports.unreadable(stage.name):
            get_run_logger().info("%s: runs again, for %s", stage.name, reason)
            lines = _dvc(stage.name, ["repro", *options, "--force", stage.name], mlflow_run, timeout_s, log_file)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{stage.name}: stopped after {timeout_s:g} s, the limit in flow.timeout_s") from error
    ran = any(line.startswith("Running stage") for line in lines)
    progress.show(1, 1)
    seconds = time.monotonic() - started
    mlflow_run.log_tags({f"stage.{stage.name}": "ran" if ran else "cached"})
    mlflow_run.log_metrics({f"stage/{stage.name}_s": seconds})
    mlflow_run.log_reports(stage.reports)
    if figures := summary.figures(stage.reports):
        outcome = f"ran, {seconds:.0f} s" if ran else "from DVC's cache"
        with suppress(*UNTOLD):
            create_markdown_artifact(f"{stage.name}: {outcome}\n\n{figures}", key=_key(stage.name))


@dataclass
class _Progress:
    """A stage's progress as an artifact of its task, from the lines it prints."""

    stage: str
    artifact: UUID | None = None
    lost: bool = False

    def read(self, line: str) -> None:
        if found := PROGRESS.match(line):
            done, of = map(int, found.groups())
            if self.artifact is None and not self.lost:
                self._create()
            self.show(done, of)

    def _create(self) -> None:
        with self._not_fatal():
            key = f"{_key(self.stage)}-progress"
            self.artifact = create_progress_artifact(0.0, key=key, description=f"How far {self.stage} is")

    def show(self, done: int, of: int) -> None:
        """Nothing where no line said any progress."""
        if self.artifact is not None and not self.lost:
            with self._not_fatal():
                update_progress_artifact(self.artifact, 100 * min(done / of, 1.0) if of else 0.0)

    @contextmanager
    def _not_fatal(self) -> Iterator[None]:
        """Asked once: each question can cost the stage a minute."""
        try:
            yield
        except UNTOLD:
            self.lost = True


def _key(stage: str) -> str:
    """Of a stage's artifacts in Prefect, which takes letters, digits and dashes."""
    return f"finercut-{stage.replace('_', '-')}"


@task(name="push", task_run_name="push", cache_policy=NO_CACHE, persist_result=False)
def _push(mlflow_run: runs.Run, log_file: Path) -> None:
    """Store results, and which inputs they belong to, in the DVC remote: other clones can take them from there."""
    _dvc("push", ["push", "--run-cache"], mlflow_run, None, log_file)


def _dvc(
    name: str,
    arguments: list[str],
    mlflow_run: runs.Run,
    timeout_s: float | None,
    log_file: Path,
    progress: _Progress | None = None,
) -> list[str]:
    """Run a DVC command, its lines going to Prefect's log and, under `name`, to `log_file`; they are returned.

    Raises:
        RuntimeError: it failed; the message is `name` and the last line that says why.
        subprocess.TimeoutExpired: after `timeout_s`.
    """
    logger = get_run_logger()
    lines: list[str] = []

    def keep(line: str) -> None:
        if line.strip().startswith(DVC_HINTS):
            return
        line = redacted(line)
        lines.append(line)
        logger.info(line)
        if progress is not None:
            progress.read(line)
        with log_file.open("a", encoding="utf-8") as file:
            file.write(f"{name}: {line}\n")

    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    if run_group(command, _environment(mlflow_run), timeout_s, keep):
        raise RuntimeError(f"{name}: {_reason(lines)}")
    return lines


def _environment(mlflow_run: runs.Run) -> dict[str, str]:
    """For a stage: this interpreter's commands first, the run to add to, and no long waits for a lost server."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_TRACKING_URI": server.tracking_uri(),
        "MLFLOW_RUN_ID": mlflow_run.run_id,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }


def _reason(lines: list[str]) -> str:
    """The stage's own last line; DVC's, which only say that it failed, if there is none."""
    others = ("ERROR: failed to reproduce", "> ", "Running stage", DVC_SUPPORT)
    told = [line for line in lines if not line.startswith(others)]
    last = (told or lines or ["no output"])[-1]
    return last.removeprefix("ERROR: ")


def run_group(
    command: list[str], environment: Mapping[str, str], timeout_s: float | None, on_line: Callable[[str], None]
) -> int:
    """Run `command` in a process group of its own, passing on its lines as they come; nothing of it outlives the call.

    DVC starts the stage, and vLLM its engine: signalling DVC alone would leave them with the accelerator. They end with
    this process too, however it ends.

    Raises:
        subprocess.TimeoutExpired: after `timeout_s`, the group being gone.
    """
    process = start_group(command, environment)

    def pump() -> None:
        lost = False
        for line in process.stdout:
            # To its end: nobody else reads the pipe, and once it is full the command waits for ever.
            if line.strip() and not lost:
                try:
                    on_line(line.rstrip())
                except (Exception, SystemExit) as error:  # rich exits where nobody reads what it writes
                    lost = True
                    with suppress(Exception, SystemExit):
                        logger.warning("what else the stage says is lost: %s", str(error) or type(error).__name__)

    # With this thread's context, by which Prefect knows whose artifacts they are.
    reader = threading.Thread(target=contextvars.copy_context().run, args=(pump,), daemon=True)
    try:
        reader.start()
        return process.wait(timeout_s)
    finally:
        end_group(process)
        process.stdin.close()
        reader.join(GRACE_S)


@task(name="register", task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
def _register_task(params: Params, mlflow_run: runs.Run) -> RegisterReport:
    try:
        report = register.run(params, mlflow_run)
    except register.Refused:
        _publish(summary.markdown(), mlflow_run)
        raise
    _publish(summary.markdown(), mlflow_run)
    return report


@contextmanager
def _collecting(params: Params, mlflow_run: runs.Run) -> Iterator[None]:
    """Collects at the end, also of an execution that failed or was refused: what it left takes as much room.

    How the execution ended is decided by then. That disk cannot be freed is therefore a failed task, a warning and a
    tag of the run, and changes nothing else.
    """
    try:
        yield
    finally:
        error = sys.exc_info()[1]
        # Whoever cancels waits for the end.
        if error is None or isinstance(error, Exception):
            _collect(params, mlflow_run)


def _collect(params: Params, mlflow_run: runs.Run) -> None:
    logger = get_run_logger()
    try:
        outcome = f"freed {_collect_task(params, mlflow_run)} bytes"
    except (ValueError, OSError, RuntimeError) as error:
        outcome = redacted(f"failed: {error}")
        logger.warning("the disk is not freed: %s; `finercut collect` does it later", error)
    try:
        mlflow_run.log_tags({"collect": outcome})
    except RuntimeError as unrecorded:
        logger.warning("what was collected is not recorded: %s", unrecorded)


@task(name="collect", task_run_name="collect", cache_policy=NO_CACHE, persist_result=False)
def _collect_task(params: Params, mlflow_run: runs.Run) -> int:
    """Bytes that are free now."""
    collected = collection.free(params, params.register_.name, mlflow_run.client)
    get_run_logger().info("%s", collection.text(collected, dry_run=False))
    if collected.problems:
        raise RuntimeError("; ".join(collected.problems))
    return collected.n_bytes


def _publish(markdown: str, mlflow_run: runs.Run) -> None:
    address = mlflow_run.page(f"/artifacts/{paths.PAGE}")
    page = f"[{paths.PAGE}]({address})" if address else str(paths.PAGE)
    with suppress(*UNTOLD):
        create_markdown_artifact(
            f"{markdown}\nEverything about it on one page: {page}\n",
            key="finercut-summary",
            description="What this execution came to",
        )


def _link(mlflow_run: runs.Run) -> None:
    """The MLflow run, one click away."""
    if address := mlflow_run.page():
        create_link_artifact(address, link_text="MLflow run", key="finercut-mlflow-run")
