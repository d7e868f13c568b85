"""Keeps a command running on the version that an alias points at, and restarts it when the alias moves."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from finercut.registry import versions
from finercut.registry.server import impatient
from finercut.registry.versions import VersionReference
from finercut.system.processes import end_group, interrupt_on_end
from finercut.system.staging import locking, staged

logger = logging.getLogger("finercut")

PLACE = "{}"


def run(reference: VersionReference, directory: Path, command: Sequence[str], interval_s: float) -> int:
    """Until the command ends by itself or this process is told to end.

    The next version is downloaded before the command is stopped. A registry that does not answer, a download that
    fails and an alias that was deleted are warnings; the command goes on.

    Args:
        directory: each version's checkpoint has a folder here, named by model, version and hash. Several watchers may
            share the directory; a folder is deleted when no watcher and no command uses it any more.
        command: `{}` stands for the checkpoint's folder

    Returns:
        the command's exit status

    Raises:
        FileNotFoundError: there is no such command.
        RuntimeError: at the start there is no such version, or the registry does not answer.
    """
    if PLACE not in command[0] and shutil.which(command[0]) is None:
        raise FileNotFoundError(f"no command {command[0]} to run")
    client = versions.connect(reference.name)
    version = versions.find(client, reference)
    interrupt_on_end()
    held = _download(version, directory)
    while True:
        with held:
            process = _start(command, held)
            try:
                logger.info("watch: %s is version %s; started %s", reference.uri, version.version, command[0])
                _delete_unused(directory, reference.name)
                moved = _wait(process, client, reference, version, directory, interval_s)
            finally:
                end_group(process)
        if moved is None:
            return process.returncode
        version, held = moved


def _start(command: Sequence[str], held: Held) -> subprocess.Popen:
    # The command holds the folder too: it may survive a watcher that was killed.
    return subprocess.Popen(
        [part.replace(PLACE, str(held.folder)) for part in command],
        start_new_session=True,
        pass_fds=[held.lock.fileno()],
    )


def _wait(
    process: subprocess.Popen,
    client: MlflowClient,
    reference: VersionReference,
    current: ModelVersion,
    directory: Path,
    interval_s: float,
) -> tuple[ModelVersion, Held] | None:
    """The version that the alias has moved to, with its downloaded folder; None if the command has ended."""
    while True:
        try:
            process.wait(interval_s)
            return None
        except subprocess.TimeoutExpired:
            pass
        try:
            with impatient():
                found = versions.find(client, reference)
            # Not by its number alone: a registered model that was deleted and made anew has a version 1 again.
            if _folder(found, directory) != _folder(current, directory):
                held = _download(found, directory)
                if process.poll() is None:
                    return found, held
                held.lock.close()
        except (RuntimeError, OSError) as error:
            logger.warning("watch: %s; version %s goes on", error, current.version)


class Held:
    """A version's folder with a shared lock on it: it is deleted only under the exclusive lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = _lock_file(folder).open("a")
        with locking(folder.parent):
            fcntl.flock(self.lock, fcntl.LOCK_SH)

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: object) -> None:
        self.lock.close()


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _folder(version: ModelVersion, directory: Path) -> Path:
    """Other models have versions of the same number, and other registries models of the same name."""
    md5 = version.tags.get(versions.PRUNED_MD5, "").partition(".")[0]
    # A version that finercut did not register has no hash, but a source of its own.
    key = md5 or hashlib.sha256(f"{version.source} {version.creation_timestamp}".encode()).hexdigest()
    return directory / f"{version.name}-{version.version}-{key[:12]}"


def _download(version: ModelVersion, directory: Path) -> Held:
    """The folder of a version's checkpoint, downloaded unless it is there; one watcher at a time downloads it."""
    target = _folder(version, directory)
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        held = Held(target)
        if target.is_dir():
            return held
        held.lock.close()
        with _lock_file(target).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                with staged(target) as partial:
                    downloaded = versions.download(version, versions.CHECKPOINT, partial)
                    for path in list(downloaded.iterdir()):
                        path.rename(partial / path.name)
                    downloaded.rmdir()


def _delete_unused(directory: Path, name: str) -> None:
    """Delete the folders of this model that nobody holds, and what downloads of it that were killed left."""
    locks = re.compile(rf"\.({re.escape(name)}-\d+-[0-9a-f]+)\.lock")
    for path in list(directory.iterdir()):
        match = locks.fullmatch(path.name)
        if match is None:
            continue
        try:
            with path.open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _discard(directory / match[1])
        except BlockingIOError:
            continue
        except OSError as error:  # another user's
            logger.warning("watch: %s is not deleted: %s", match[1], error)


def _discard(folder: Path) -> None:
    """Under its own name the folder is complete or not there, also if this process is killed meanwhile."""
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        folder.rename(old)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
