"""Deletes what no rule keeps: old versions' checkpoints, DVC's cache, interrupted work.

A version keeps its evidence, its metrics and its place in the registry; only the checkpoint is deleted. First the log
in `finercut.registry.ledger` gets an entry, so that no promotion or rollback chooses the version meanwhile.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
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

# What a store, a server, DVC or the disk raises; none of it may keep the rest from being deleted.
_ERRORS = (RuntimeError, ValueError, OSError)


@dataclass(frozen=True)
class Unneeded:
    """One thing that no rule keeps."""

    what: str
    n_bytes: int
    delete: Callable[[], None]


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
    """What could not be found or deleted, and why; each kept nothing else from being deleted."""

    def take(self, found: Iterator[Unneeded | str], dry_run: bool) -> None:
        """Delete each thing that `found` finds, in spite of errors of others; texts are problems of its own."""
        try:
            for one in found:
                if isinstance(one, str):
                    self.problems.append(one)
                else:
                    self._delete(one, dry_run)
        except _ERRORS as error:
            self.problems.append(str(error))

    def _delete(self, one: Unneeded, dry_run: bool) -> None:
        try:
            if not dry_run:
                one.delete()
            self.freed.append(Freed(one.what, one.n_bytes))
        except _ERRORS as error:
            self.problems.append(f"{one.what}: {error}")

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for one in self.freed)


def run(params: Params, name: str | None = None, dry_run: bool = False) -> Collected:
    """Delete what `params.collect` does not keep.

    Args:
        name: of a registered model; None is that of `params`, which nothing may have been registered as yet, and whose
            registry may not answer: this machine is freed all the same.

    Raises:
        RuntimeError: no such registered model, or as `free` does.
    """
    if name is not None:
        return free(params, name, versions.connect(name), dry_run)
    name = params.register_.name
    try:
        client, problem = versions.connect(name, must_exist=False), None
    except RuntimeError as error:
        client, problem = None, str(error)
    collected = free(params, name, client, dry_run)
    if problem is not None:
        collected.problems.append(problem)
    return collected


def free(params: Params, name: str, client: MlflowClient | None, dry_run: bool = False) -> Collected:
    """As `run`, also where no version of `name` has been registered yet.

    Args:
        client: None frees this machine alone.

    Raises:
        RuntimeError: a stage at work in this workspace: then nothing is deleted.
    """
    keep = params.collect
    before = datetime.now(UTC) - timedelta(days=keep.unfinished_days)
    collected = Collected()
    with nullcontext() if dry_run else exclusive(paths.WORK):
        if client is not None:
            ledger = Ledger(client, name)
            for version in _unkept(client, name, keep.versions, collected):
                collected.take(_checkpoint(ledger, version, dry_run), dry_run)
            collected.take(_uploads(client, params.flow.experiment, name, before), dry_run)
        collected.take(_cache(keep.commits), dry_run)
        collected.take(_work(keep.versions, before.timestamp()), dry_run)
    return collected


def _unkept(client: MlflowClient, name: str, n_kept: int, collected: Collected) -> list[ModelVersion]:
    """Finercut's own versions of `name` but the newest `n_kept`, oldest first."""
    try:
        listed = versions.every(client, name)
    except RuntimeError as error:
        collected.problems.append(str(error))
        return []
    if foreign := [str(version.version) for version in reversed(listed) if not versions.is_finercuts(version)]:
        logger.warning("collect: versions of %s that are not finercut's stay: %s", name, ", ".join(foreign))
    return list(reversed([version for version in listed if versions.is_finercuts(version)][n_kept:]))


def _checkpoint(ledger: Ledger, version: ModelVersion, dry_run: bool) -> Iterator[Unneeded | str]:
    stored = versions.stored(ledger.client, version)
    if stored is None:
        logger.warning("collect: %s version %s has no files of its own, and stays", ledger.model, version.version)
        return
    what = f"checkpoint of {ledger.model} version {version.version}"
    try:
        # Before the log says that it is given up: a version whose files cannot be found stays as it is.
        n_bytes = stored.n_bytes(versions.CHECKPOINT)
    except _ERRORS as error:
        yield f"{what}: {error}"
        return
    if _given_up(ledger, version, dry_run) and n_bytes:
        yield Unneeded(what, n_bytes, lambda: stored.delete(versions.CHECKPOINT))


def _given_up(ledger: Ledger, version: ModelVersion, dry_run: bool) -> bool:
    """Whether the log says, or now says, that this version's checkpoint is no longer kept."""
    number = str(version.version)
    while True:
        state = ledger.read()
        if number in state.collected:
            return True
        if number in _in_use(ledger, state):
            return False
        if copies := versions.copies(ledger.client, version):
            logger.warning(
                "collect: %s version %s stays: %s has its files by reference", ledger.model, number, ", ".join(copies)
            )
            return False
        if dry_run or ledger.append(state, "collected", number, version.run_id, reason="collect"):
            return True


def _in_use(ledger: Ledger, state: State) -> set[str | None]:
    """Versions with any alias, the champion and the one before by the log, and the version of the last run here."""
    report = paths.report("register")
    last = RegisterReport.read(report) if report.is_file() else None
    last_run = {last.version} if last is not None and last.name == ledger.model else set()
    return {*ledger.aliases().values(), state.champion, state.previous} | last_run


def _uploads(client: MlflowClient, experiment: str, name: str, before: datetime) -> Iterator[Unneeded | str]:
    for model_id, stored in versions.unregistered(client, experiment, name, before):
        what = f"upload {model_id} that no version came of"
        try:
            n_bytes = stored.n_bytes()
        except _ERRORS as error:
            yield f"{what}: {error}"
            continue

        def delete(model_id: str = model_id, stored: versions.Stored = stored) -> None:
            stored.delete()
            with mlflow_errors(f"delete {model_id}"):
                client.delete_logged_model(model_id)

        yield Unneeded(what, n_bytes, delete)


def _cache(n_commits: int) -> Iterator[Unneeded]:
    if dag.cache_is_shared():
        yield Unneeded("nothing of DVC's cache, which is outside the project and may be shared", 0, lambda: None)
        return
    files = dag.unused(n_commits)
    if files:
        n_bytes = sum(file.stat().st_size for file in files)
        yield Unneeded(f"{len(files)} files of DVC's cache", n_bytes, lambda: dag.remove_unused(n_commits))


def _work(n_searches: int, before: float) -> Iterator[Unneeded]:
    """Searches but the newest, and what interrupted stages left."""
    searches = sorted((paths.WORK / "search").glob("*"), key=_touched, reverse=True)
    folders = (paths.WORK / stage for stage in ("costs", "fetch", "heal", "promote"))
    left = [path for folder in folders for path in folder.glob("*") if _touched(path) < before]
    for path in [*searches[n_searches:], *left]:
        yield Unneeded(str(path), _n_bytes(path), partial(_remove, path))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _n_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())


def _touched(path: Path) -> float:
    """When anything in it was last written, in seconds since 1970."""
    return max((p.stat().st_mtime for p in path.rglob("*")), default=path.stat().st_mtime)


def text(collected: Collected, dry_run: bool) -> str:
    """One line for each thing that was deleted, the total, and what could not be deleted."""
    lines = [f"{_size(one.n_bytes):>10}  {one.what}" for one in collected.freed]
    verb = "would be freed" if dry_run else "freed"
    problems = [f"not deleted: {problem}" for problem in collected.problems]
    return "\n".join([*lines, f"{_size(collected.n_bytes):>10}  {verb}", *problems])


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
