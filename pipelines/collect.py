"""Deletes what no rule keeps: old versions' checkpoints, DVC's cache, interrupted work.

A version keeps its evidence, its metrics and its place in the registry; only the checkpoint is deleted. First the log
in `finercut.registry.ledger` gets an entry, so that no promotion or rollback chooses the version meanwhile.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from finercut.registry import versions
from finercut.registry.ledger import Ledger, State
from finercut.registry.records import RegisterReport
from finercut.registry.server import mlflow_errors
from finercut.system.staging import exclusive

from . import dag, paths
from .params import Params

logger = logging.getLogger("finercut")

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Freed:
    """One thing that was deleted, or would be."""

    what: str
    n_bytes: int


@dataclass(frozen=True)
class Collected:
    """The result of a collection."""

    freed: list[Freed] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What could not be deleted, and why; each kept nothing else from being deleted."""

    def take(self, found: Iterator[Freed]) -> None:
        """Add what `found` deletes, up to its first error."""
        try:
            for one in found:
                self.freed.append(one)
        except (RuntimeError, ValueError, OSError) as error:
            self.problems.append(str(error))

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for one in self.freed)


def run(params: Params, name: str, dry_run: bool = False) -> Collected:
    """Delete what `params.collect` does not keep.

    Raises:
        RuntimeError: no such registered model, or as `free` does.
    """
    return free(params, name, versions.connect(name), dry_run)


def free(params: Params, name: str, client: MlflowClient, dry_run: bool = False) -> Collected:
    """As `run`, also where no version of `name` has been registered yet.

    Raises:
        RuntimeError: a stage at work in this workspace: then nothing is deleted.
    """
    keep = params.collect
    before = datetime.now(UTC) - timedelta(days=keep.unfinished_days)
    collected = Collected()
    with nullcontext() if dry_run else exclusive(paths.WORK):
        for version in _unkept(client, name, keep.versions, collected):
            collected.take(_checkpoint(client, Ledger(client, name), version, dry_run))
        collected.take(_uploads(client, params.flow.experiment, name, before, dry_run))
        collected.take(_cache(keep.commits, dry_run))
        collected.take(_work(keep.versions, before.timestamp(), dry_run))
    return collected


def _unkept(client: MlflowClient, name: str, n_kept: int, collected: Collected) -> list[ModelVersion]:
    """Finercut's own versions of `name` but the newest, oldest first."""
    try:
        listed = versions.every(client, name)[n_kept:]
    except RuntimeError as error:
        collected.problems.append(str(error))
        return []
    for version in listed:
        if versions.PRUNED_MD5 not in version.tags:
            logger.warning("collect: %s version %s is not finercut's, and stays", name, version.version)
    return [version for version in reversed(listed) if versions.PRUNED_MD5 in version.tags]


def _checkpoint(client: MlflowClient, ledger: Ledger, version: ModelVersion, dry_run: bool) -> Iterator[Freed]:
    # Found before the log says that it is given up: a version whose files cannot be found stays as it is.
    stored = versions.stored(client, version)
    if not _given_up(ledger, version, dry_run):
        return
    n_bytes = stored.n_bytes(CHECKPOINT)
    if n_bytes:
        if not dry_run:
            stored.delete(CHECKPOINT)
        yield Freed(f"checkpoint of {ledger.model} version {version.version}", n_bytes)


def _given_up(ledger: Ledger, version: ModelVersion, dry_run: bool) -> bool:
    """Whether the log says, or now says, that this version's checkpoint is no longer kept."""
    number = str(version.version)
    while True:
        state = ledger.read()
        if number in state.collected:
            return True
        if number in _in_use(ledger, state):
            return False
        if dry_run or ledger.append(state, "collected", number, version.run_id, reason="collect"):
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
    """Searches but the newest, and what interrupted downloads and healings left."""
    searches = sorted((paths.WORK / "search").glob("*"), key=_touched, reverse=True)
    left = [
        p for folder in ("fetch", "heal", "promote") for p in (paths.WORK / folder).glob("*") if _touched(p) < before
    ]
    for path in [*searches[n_searches:], *left]:
        freed = Freed(str(path), sum(f.stat().st_size for f in path.rglob("*") if f.is_file()))
        if not dry_run:
            shutil.rmtree(path)
        yield freed


def _touched(path: Path) -> float:
    """When anything in it was last written, in seconds since 1970."""
    return max((p.stat().st_mtime for p in path.rglob("*")), default=path.stat().st_mtime)


def text(collected: Collected, dry_run: bool) -> str:
    """For people, with the total and what could not be deleted."""
    lines = [f"{_size(one.n_bytes):>10}  {one.what}" for one in collected.freed]
    verb = "would be freed" if dry_run else "freed"
    problems = [f"not deleted: {problem}" for problem in collected.problems]
    return "\n".join([*lines, f"{_size(collected.n_bytes):>10}  {verb}", *problems])


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
