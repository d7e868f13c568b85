"""Keep a command running on the version an alias stands at: when the alias moves, bring that version and start anew."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from finercut.registry import versions
from finercut.registry.runs import impatient
from finercut.registry.versions import Reference
from finercut.system.processes import end_group
from finercut.system.staging import staged

logger = logging.getLogger("finercut")

PLACE = "{}"


def run(reference: Reference, directory: Path, command: Sequence[str], interval_s: float) -> int:
    """Until the command ends by itself or this process is told to end.

    The next version is downloaded before the last one's command is stopped. A registry that does not answer, a download
    that fails and an alias that is gone change nothing: what runs goes on.

    Args:
        directory: each version's checkpoint gets a folder here, named by its number; others are removed
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
    checkpoint = _bring(version, directory)
    while True:
        process = _start(command, checkpoint)
        logger.info("watch: %s is version %s; started %s", reference.uri, version.version, command[0])
        _forget_others(checkpoint)
        try:
            moved = _wait(process, client, reference, version, directory, interval_s)
        finally:
            end_group(process)
        if moved is None:
            return process.returncode
        version, checkpoint = moved


def _start(command: Sequence[str], checkpoint: Path) -> subprocess.Popen:
    return subprocess.Popen([part.replace(PLACE, str(checkpoint)) for part in command], start_new_session=True)


def _wait(
    process: subprocess.Popen,
    client: MlflowClient,
    reference: Reference,
    current: ModelVersion,
    directory: Path,
    interval_s: float,
) -> tuple[ModelVersion, Path] | None:
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


def _bring(version: ModelVersion, directory: Path) -> Path:
    target = directory / str(version.version)
    if not target.is_dir():
        with staged(target) as partial:
            downloaded = versions.download(version, "checkpoint", partial)
            for path in list(downloaded.iterdir()):
                path.rename(partial / path.name)
            downloaded.rmdir()
    return target


def _forget_others(kept: Path) -> None:
    for path in kept.parent.iterdir():
        if path != kept and path.name.isdecimal():
            shutil.rmtree(path)
