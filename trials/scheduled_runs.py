"""Scheduled runs of a deployment, followed one by one: the record each left against the plan's, and what else it left.

For `make soak` and, with toy stages, for `make test-matrix`. What a record should be is reckoned from the plan alone,
without DVC, Prefect and MLflow.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import UUID

import psutil
import servers

PATIENCE_S = 1800
# Between when a run is due and when the server must have made it.
SCHEDULER_PATIENCE_S = 60
# After a run has ended, its processes may take this long to be gone.
GRACE_S = 30
DEPLOYMENT = "finercut/nightly"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Planned:
    """A scheduled run."""

    settings: dict[str, object]
    """Overrides that change what stages compute."""
    others: dict[str, object] = field(default_factory=dict)
    """Further overrides."""
    ending: str = "registered"
    """Or "refused" by the gate, or the name of the stage that fails."""

    @property
    def overrides(self) -> dict[str, object]:
        return self.settings | self.others


@dataclass(frozen=True)
class Record:
    """What is known of a run afterwards."""

    prefect: str
    mlflow: tuple[str, ...]
    """The status of every run in MLflow that says it is of this one."""
    stages: dict[str, str]
    register: str | None
    version: str | None
    """That it made or found."""
    made: tuple[str, ...]
    """Versions that say they are of this run."""
    collected: bool
    challenger: str | None
    checkpoints: tuple[str, ...]
    """Versions that have theirs."""


class Expected:
    """The record each run of a plan should leave, in the order they came."""

    def __init__(self, concerned: Mapping[str, Sequence[str]], stages: Sequence[str], n_kept: int):
        """
        Args:
            concerned: for each setting of the plan, the stages that have to run again when it changes
            n_kept: `collect.versions`
        """
        self.concerned, self.stages, self.n_kept = concerned, stages, n_kept
        self.done: dict[str, dict] = {}
        self.versions: dict[str, str] = {}
        self.n_versions = 0
        self.last: str | None = None
        self.challenger: str | None = None
        self.kept: set[str] = set()

    def after(self, run: Planned) -> Record:
        stages = {}
        for stage in self.stages:
            if stage == run.ending:
                break
            inputs = self._inputs(stage, run)
            stages[stage] = "cached" if self.done.get(stage) == inputs else "ran"
            self.done[stage] = inputs
        register, made = None, False
        if run.ending in ("registered", "refused"):
            register, made = self._register(run)
        newest = {str(number) for number in range(max(1, self.n_versions - self.n_kept + 1), self.n_versions + 1)}
        self.challenger = self.last or self.challenger
        self.kept &= newest | {self.challenger}
        passed = run.ending == "registered"
        return Record(
            prefect="COMPLETED" if passed else "FAILED",
            mlflow=("FINISHED" if passed else "FAILED",),
            stages=stages,
            register=register,
            version=self.last if passed else None,
            made=(self.last,) if made else (),
            collected=True,
            challenger=self.challenger,
            checkpoints=_in_order(self.kept),
        )

    def _inputs(self, stage: str, run: Planned) -> dict[str, object]:
        return {name: value for name, value in run.settings.items() if stage in self.concerned[name]}

    def _register(self, run: Planned) -> tuple[str, bool]:
        if run.ending == "refused":
            self.last = None
            return "refused", False
        checkpoint = json.dumps(self._inputs("prune", run), sort_keys=True)
        if self.versions.get(checkpoint) in self.kept:
            self.last = self.versions[checkpoint]
            return "already registered", False
        self.n_versions += 1
        self.last = self.versions[checkpoint] = str(self.n_versions)
        self.kept.add(self.last)
        return "registered", True


@dataclass(frozen=True)
class Disk:
    """Bytes."""

    workspace: int
    checkpoints: int
    worker: int
    notes: int
    """DVC's, of which inputs gave which outputs."""
    records: int
    """What MLflow's store has of runs and versions besides checkpoints."""


@dataclass(frozen=True)
class Outcome:
    planned: Planned
    record: Record
    disk: Disk
    seconds: float
    wrong: list[str]
    orphans: list[str]
    files: list[str]
    """Temporary ones that it left."""


@dataclass(frozen=True)
class Site:
    """Where runs work, and where to look for what they leave."""

    workspace: Path
    worker: Path
    """The worker's home; `environment` puts its caches and temporary files there too."""
    store: servers.S3
    name: str
    """Of the experiment and of the registered model."""
    shared_memory: bool = True
    """Whether to look there; not where others come and go."""

    @property
    def environment(self) -> dict[str, str]:
        """For the worker."""
        self._temporary.mkdir(parents=True, exist_ok=True)
        return {
            "FINERCUT_WORKSPACE": str(self.workspace),
            "HOME": str(self.worker),
            "TMPDIR": str(self._temporary),
            "DVC_SITE_CACHE_DIR": str(self.worker / "dvc"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }

    @property
    def _temporary(self) -> Path:
        return self.worker / "tmp"

    def temporary(self) -> set[Path]:
        """What lies in the folders for temporary files; in shared memory, files that no living process has mapped."""
        # Prefect and torch have one folder each there, however many runs use it.
        shared = ("runner_storage", "torchinductor_")
        found = {path for path in self._temporary.iterdir() if not path.name.startswith(shared)}
        if self.shared_memory:
            found |= {Path(entry) for entry in os.scandir(SHARED_MEMORY) if _is_our_file(entry)} - _mapped()
        return found


def _is_our_file(entry: os.DirEntry) -> bool:
    with suppress(FileNotFoundError):
        return entry.is_file() and entry.stat().st_uid == os.getuid()
    return False


def _mapped() -> set[Path]:
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            lines = maps.read_text().splitlines()
            found |= {Path(line[line.index("/") :]) for line in lines if str(SHARED_MEMORY) in line}
    return found


def schedule(plan: Sequence[Planned], in_s: float) -> dict[UUID, Planned]:
    """Give the deployment a schedule for each run, a second apart, and wait until Prefect has made runs of them.

    Args:
        in_s: when the first is due; Prefect looks for new schedules now and then
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import RRuleSchedule

    first = datetime.now(UTC) + timedelta(seconds=in_s)
    due = [f"DTSTART:{first + timedelta(seconds=number):%Y%m%dT%H%M%SZ}" for number in range(len(plan))]
    wanted = [
        DeploymentScheduleCreate(
            schedule=RRuleSchedule(rrule=f"{start}\nRRULE:FREQ=DAILY;COUNT=1"),
            parameters={"overrides": run.overrides},
            slug=f"soak-{number}",
        )
        for number, (start, run) in enumerate(zip(due, plan, strict=True))
    ]
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        created = client.create_deployment_schedules(deployment.id, wanted)
    planned = {made.id: run for made, run in zip(created, plan, strict=True)}
    deadline = time.monotonic() + in_s + SCHEDULER_PATIENCE_S
    while time.monotonic() < deadline:
        found = {run.id: planned[run.created_by.id] for run in _flow_runs() if run.created_by.id in planned}
        if len(found) == len(plan):
            return found
        time.sleep(1)
    raise RuntimeError(f"Prefect made {len(found)} runs of {len(plan)} schedules; were they due before it looked?")


def _flow_runs() -> list:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        only = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
        return [run for run in client.read_flow_runs(deployment_filter=only) if run.auto_scheduled]


def follow(site: Site, scheduled: Mapping[UUID, Planned], expected: Expected) -> Iterator[Outcome]:
    """Look at each run as it ends. The next one has started by then, but has not come far."""
    strangers, before = set(psutil.process_iter()), site.temporary()
    waiting, deadline = dict(scheduled), time.monotonic() + PATIENCE_S
    while waiting and time.monotonic() < deadline:
        time.sleep(2)
        ended = [run for run in _flow_runs() if run.id in waiting and run.state.is_final()]
        for run in sorted(ended, key=lambda run: run.end_time):
            planned = waiting.pop(run.id)
            record, disk = _record(site, run), _disk(site)
            orphans = _left(partial(_processes, site, run, strangers))
            files = _left(partial(_files, site, run, before))
            before |= files
            yield Outcome(
                planned=planned,
                record=record,
                disk=disk,
                seconds=run.total_run_time.total_seconds(),
                wrong=_differences(expected.after(planned), record),
                orphans=[str(process) for process in orphans],
                files=sorted(map(str, files)),
            )
            deadline = time.monotonic() + PATIENCE_S
    if waiting:
        raise RuntimeError(f"{len(waiting)} runs have not ended, and none has for {PATIENCE_S} s")


def _differences(expected: Record, found: Record) -> list[str]:
    pairs = [(f.name, getattr(expected, f.name), getattr(found, f.name)) for f in fields(Record)]
    return [f"{name}: {was}, not {wanted}" for name, wanted, was in pairs if was != wanted]


def _record(site: Site, flow_run) -> Record:
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(site.name).experiment_id
    runs = client.search_runs([experiment], f"tags.`prefect.flow_run_id` = '{flow_run.id}'")
    tags = runs[0].data.tags if runs else {}
    report = {}
    if "register" in tags:
        report = mlflow.artifacts.load_dict(f"runs:/{runs[0].info.run_id}/reports/register.json")
    versions = client.search_model_versions(f"name = '{site.name}'")
    stored = {key.split("/")[2] for key in _objects(site) if "/checkpoint/" in key}
    aliases = client.get_registered_model(site.name).aliases if versions else {}
    return Record(
        prefect=flow_run.state.type.value,
        mlflow=tuple(run.info.status for run in runs),
        # `environment` runs every time.
        stages={
            name.removeprefix("stage."): how
            for name, how in tags.items()
            if name.startswith("stage.") and name != "stage.environment"
        },
        register=tags.get("register"),
        version=report.get("version"),
        made=_in_order(str(v.version) for v in versions if runs and v.run_id == runs[0].info.run_id),
        collected=tags.get("collect", "").startswith("freed"),
        challenger=str(aliases["challenger"]) if "challenger" in aliases else None,
        checkpoints=_in_order(str(v.version) for v in versions if v.source.removeprefix("models:/") in stored),
    )


def _in_order(versions) -> tuple[str, ...]:
    return tuple(sorted(versions, key=int))


def _objects(site: Site) -> dict[str, int]:
    """Of the experiment, in MLflow's store: EXPERIMENT/models/MODEL/artifacts/... and their bytes."""
    import mlflow

    experiment = mlflow.MlflowClient().get_experiment_by_name(site.name).experiment_id
    return site.store.objects("mlflow", f"{experiment}/")


def _disk(site: Site) -> Disk:
    stored, notes = _objects(site), _n_bytes(site.workspace / ".dvc/cache/runs")
    checkpoints = sum(size for key, size in stored.items() if "/checkpoint/" in key)
    return Disk(
        workspace=_n_bytes(site.workspace) - notes,
        checkpoints=checkpoints,
        worker=_n_bytes(site.worker),
        notes=notes,
        records=sum(stored.values()) - checkpoints,
    )


def _n_bytes(folder: Path) -> int:
    """Of files; of hard links to one file, once."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found = os.lstat(os.path.join(parent, name))
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def _files(site: Site, flow_run, before: set[Path]) -> set[Path]:
    """Temporary ones last touched before the run ended; what came later is of the next one."""
    found = set()
    for path in site.temporary() - before:
        with suppress(FileNotFoundError):
            if path.lstat().st_ctime < flow_run.end_time.timestamp():
                found.add(path)
    return found


def _processes(site: Site, flow_run, strangers: set[psutil.Process]) -> set[psutil.Process]:
    """Of the run, which has ended.

    By the environment that the worker gives each run; vLLM's engines write over theirs, but work in the same folder,
    where whatever is older than the run's end cannot be of the next one.
    """

    def of_the_run(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == str(flow_run.id):
                return True
            here = Path(process.cwd()).is_relative_to(site.workspace)
            return here and process.create_time() < flow_run.end_time.timestamp()
        return False

    return set(filter(of_the_run, psutil.process_iter())) - strangers


def _left(look: Callable[[], set]) -> set:
    """What is still found after a while."""
    deadline = time.monotonic() + GRACE_S
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found
