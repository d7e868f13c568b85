"""Free the disk of what no rule keeps: old versions' checkpoints, DVC's cache, interrupted work.

A version keeps its evidence, its metrics and its place in the registry; only the checkpoint goes. That it goes is first
an entry of the log in `finercut.registry.ledger`, so that no promotion or rollback can choose it meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from finercut.registry import versions
from finercut.registry.ledger import Ledger, State
from finercut.registry.records import RegisterReport
from finercut.registry.runs import mlflow_errors
from finercut.system.staging import exclusive
from pipelines import dag, paths
from pipelines.params import Params

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Freed:
    """One thing that went, or would go."""

    what: str
    n_bytes: int


def run(params: Params, name: str, dry_run: bool = False) -> list[Freed]:
    """Delete what `params.retention` does not keep.

    Raises:
        RuntimeError: no such registered model, or as `free` does.
    """
    return free(params, name, versions.connect(name), dry_run)


def free(params: Params, name: str, client: MlflowClient, dry_run: bool = False) -> list[Freed]:
    """As `run`, also where no version of `name` has been registered yet.

    Raises:
        RuntimeError: a registry that does not answer, no DVC repository, or a stage at work in this workspace: then
            nothing has gone.
    """
    keep = params.retention
    before = datetime.now(UTC) - timedelta(days=keep.unfinished_days)
    with nullcontext() if dry_run else exclusive(paths.WORK):
        return [
            *_checkpoints(client, name, keep.versions, dry_run),
            *_uploads(client, params.flow.experiment, name, before, dry_run),
            *_cache(keep.commits, dry_run),
            *_work(keep.versions, before.timestamp(), dry_run),
        ]


def _checkpoints(client: MlflowClient, name: str, n_kept: int, dry_run: bool) -> Iterator[Freed]:
    ledger = Ledger(client, name)
    for version in reversed(versions.every(client, name)[n_kept:]):
        if not _given_up(ledger, version, dry_run):
            continue
        stored = versions.stored(client, version)
        n_bytes = stored.n_bytes(CHECKPOINT)
        if n_bytes:
            if not dry_run:
                stored.delete(CHECKPOINT)
            yield Freed(f"checkpoint of {name} version {version.version}", n_bytes)


def _given_up(ledger: Ledger, version: ModelVersion, dry_run: bool) -> bool:
    """Whether the log says, or now says, that this version's checkpoint is no longer kept."""
    number = str(version.version)
    while True:
        state = ledger.read()
        if number in state.collected:
            return True
        if number in _in_use(ledger, state):
            return False
        if dry_run or ledger.append(state, "collected", number, version.run_id, reason="retention"):
            return True


def _in_use(ledger: Ledger, state: State) -> set[str | None]:
    """Whatever has an alias, whoever set it; what the log says they should be at; what the last run here came to."""
    report = paths.report("register")
    last = RegisterReport.read(report) if report.is_file() else None
    last_run = {last.version} if last is not None and last.name == ledger.model else set()
    return {*ledger.aliases().values(), state.champion, state.previous} | last_run


def _uploads(client: MlflowClient, experiment: str, name: str, before: datetime, dry_run: bool) -> Iterator[Freed]:
    for model_id, stored in versions.unregistered(client, experiment, name, before):
        freed = Freed(f"upload {model_id} that no version came of", stored.n_bytes())
        if not dry_run:
            stored.delete()
            with mlflow_errors(f"delete {model_id}"):
                client.delete_logged_model(model_id)
        yield freed


def _cache(n_commits: int, dry_run: bool) -> Iterator[Freed]:
    if dag.cache_is_shared():
        yield Freed("nothing of DVC's cache, which is outside the project and may be shared", 0)
        return
    files = dag.unused(n_commits)
    n_bytes = sum(file.stat().st_size for file in files)
    if files:
        if not dry_run:
            dag.remove_unused(n_commits)
        yield Freed(f"{len(files)} files of DVC's cache", n_bytes)


def _work(n_searches: int, before: float, dry_run: bool) -> Iterator[Freed]:
    """Searches but the newest, and what interrupted downloads left."""
    searches = sorted((paths.WORK / "search").glob("*"), key=_touched, reverse=True)
    left = [p for folder in ("fetch", "promote") for p in (paths.WORK / folder).glob("*") if _touched(p) < before]
    for path in [*searches[n_searches:], *left]:
        freed = Freed(str(path), sum(f.stat().st_size for f in path.rglob("*") if f.is_file()))
        if not dry_run:
            shutil.rmtree(path)
        yield freed


def _touched(path: Path) -> float:
    """When anything in it was last written, in seconds since 1970."""
    return max((p.stat().st_mtime for p in path.rglob("*")), default=path.stat().st_mtime)


def text(freed: list[Freed], dry_run: bool) -> str:
    """For people, with the total."""
    lines = [f"{_size(f.n_bytes):>10}  {f.what}" for f in freed]
    verb = "would be freed" if dry_run else "freed"
    return "\n".join([*lines, f"{_size(total(freed)):>10}  {verb}"])


def total(freed: list[Freed]) -> int:
    """Bytes."""
    return sum(f.n_bytes for f in freed)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
