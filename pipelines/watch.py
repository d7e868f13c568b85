"""Keeps a command running on the version that an alias points at, and restarts it when the alias moves."""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from finercut.registry import versions
from finercut.registry.server import impatient
from finercut.registry.versions import VersionReference
from finercut.system.processes import end_group
from finercut.system.staging import staged

logger = logging.getLogger("finercut")

PLACE = "{}"


def run(reference: VersionReference, directory: Path, command: Sequence[str], interval_s: float) -> int:
    """Until the command ends by itself or this process is told to end.

    The next version is downloaded before the last one's command is stopped. A registry that does not answer, a download
    that fails and an alias that is gone change nothing: what runs goes on.

    Args:
        directory: each version's checkpoint gets a folder here, named by model, version and hash. Several watchers may
            share it; a folder is removed when its watcher has moved on and no other one uses it.
        command: `{}` stands for the checkpoint's folder

    Returns:
        the command's exit status

    Raises:
        RuntimeError: at the start there is no such version, or no registry that answers.
    """
    client = versions.connect(reference.name)
    version = versions.find(client, reference)
    # Asked to end, by a supervisor or by Ctrl-C, leave by the way that ends the command too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    held = _bring(version, directory)
    while True:
        with held as checkpoint:
            process = _start(command, checkpoint)
            logger.info("watch: %s is version %s; started %s", reference.uri, version.version, command[0])
            _forget_others(checkpoint, reference.name)
            try:
                moved = _wait(process, client, reference, version, directory, interval_s)
            finally:
                end_group(process)
        if moved is None:
            return process.returncode
        version, held = moved


def _start(command: Sequence[str], checkpoint: Path) -> subprocess.Popen:
    return subprocess.Popen([part.replace(PLACE, str(checkpoint)) for part in command], start_new_session=True)


def _wait(
    process: subprocess.Popen,
    client: MlflowClient,
    reference: VersionReference,
    current: ModelVersion,
    directory: Path,
    interval_s: float,
) -> tuple[ModelVersion, Held] | None:
    """The version the alias has moved to, with its files here; None if the command has ended."""
    while True:
        try:
            process.wait(interval_s)
            return None
        except subprocess.TimeoutExpired:
            pass
        try:
            with impatient():
                found = versions.find(client, reference)
            if found.version != current.version:
                return found, _bring(found, directory)
        except (RuntimeError, OSError) as error:
            logger.warning("watch: %s; version %s goes on", error, current.version)


class Held:
    """A version's folder, which no watcher removes while this one holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = _lock_file(folder).open("a")
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *_: object) -> None:
        self._lock.close()


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _folder(version: ModelVersion, directory: Path) -> Path:
    """Other models have versions of the same number, other registries models of the same name."""
    md5 = version.tags.get(versions.PRUNED_MD5, "0").partition(".")[0]
    return directory / f"{version.name}-{version.version}-{md5[:12]}"


def _bring(version: ModelVersion, directory: Path) -> Held:
    """Download a version's checkpoint, unless its folder is there; one watcher at a time downloads it."""
    target = _folder(version, directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _lock_file(target).open("a") as lock:
        if not target.is_dir():
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            with staged(target) as partial:
                downloaded = versions.download(version, "checkpoint", partial)
                for path in list(downloaded.iterdir()):
                    path.rename(partial / path.name)
                downloaded.rmdir()
        # Taken before the exclusive lock is given back: nobody removes the folder in between.
        fcntl.flock(lock, fcntl.LOCK_SH)
        return Held(target)


def _forget_others(kept: Path, name: str) -> None:
    """Remove the other folders of this model that no watcher holds."""
    ours = re.compile(rf"{re.escape(name)}-\d+-[0-9a-f]+")
    for folder in kept.parent.iterdir():
        if folder == kept or not ours.fullmatch(folder.name):
            continue
        with _lock_file(folder).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder)
