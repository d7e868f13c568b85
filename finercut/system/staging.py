"""Files and directories that are whole or not there, and a folder that one process at a time works in."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Errors within the block say what could not be written: the system's often do not, safetensors' are no OSErrors.

    Raises:
        OSError
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        RuntimeError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RuntimeError(
                f"process {file.read()} works in {folder.absolute().parent}: wait until it has ended, or end it"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` that takes its place when the block ends well, and goes when it does not.

    A process killed on the way leaves `.<name>.partial` or `.<name>.old`, which the next one clears away, never a
    mixture under the name itself.
    """
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with writing(target):
            yield partial
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; what is there when the block ends well is on the disk and takes its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with writing(target):
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
