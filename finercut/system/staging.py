"""Atomic writes, and the workspace lock."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

# For processes that the holder of a folder starts: its id and the folder.
HELD_BY = "FINERCUT_HELD_BY"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raise errors of the block as OSErrors that name `target`: some of the system's name no file, and safetensors'
    are no OSErrors."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


@contextmanager
def locking(folder: Path) -> Iterator[None]:
    """Say so where the file system of `folder` has no locks.

    Raises:
        OSError: it has none.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise OSError(
            f"the file system of {folder.absolute()} has no file locks ({error.strerror}): "
            "work on one that has them, such as a local disk, or have them enabled"
        ) from error


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process and those it starts meanwhile, which find in the environment who holds it.

    The lock goes with the process, however that ends.

    Raises:
        RuntimeError: another process holds it.
        OSError: the file system of `folder` has no locks.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is in the way, which is no folder: move it elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"
    try:
        opened = lock.open("a+")
    except PermissionError as error:
        raise PermissionError(f"{lock} is {_owner(lock)}'s: work as that user, or in a clone of your own") from error
    with opened as file:
        try:
            with locking(folder):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read()
            if not holder or os.environ.get(HELD_BY) != _hold(holder, folder):
                raise RuntimeError(
                    f"process {holder or 'unknown'} works in {folder.absolute().parent}: "
                    "wait until it has ended, or end it"
                ) from error
            yield
            return
        file.truncate(0)
        with suppress(OSError):  # no space is left, which `finercut collect` changes; the lock is held all the same
            os.write(file.fileno(), str(os.getpid()).encode())
        before = os.environ.get(HELD_BY)
        os.environ[HELD_BY] = _hold(str(os.getpid()), folder)
        try:
            yield
        finally:
            if before is None:
                del os.environ[HELD_BY]
            else:
                os.environ[HELD_BY] = before
            file.truncate(0)


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, OSError):
        return "another user"


def _hold(holder: str, folder: Path) -> str:
    return f"{holder}:{folder.resolve()}"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty directory beside `target`, which replaces it if the block succeeds and is deleted if it fails.

    A killed process leaves `.<name>.partial` or `.<name>.old`, which the next call deletes, but never a mixture of old
    and new files under the name itself. Where `target` is a link, to another disk for example, what it leads to is
    replaced.
    """
    if target.is_symlink():
        target = target.resolve()
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with writing(target):
            yield partial
        _admit_readers(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _admit_readers(directory: Path) -> None:
    """Let whoever may read `directory` read what is in it: safetensors writes files that only their owner can read."""
    allowed = directory.stat().st_mode  # as the umask has it
    for path in directory.rglob("*"):
        if path.is_symlink():
            continue
        added = allowed & 0o777 if path.is_dir() else 0o600 | allowed & 0o444
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode | added != mode:
            path.chmod(mode | added)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path beside `target`; what is written there is on the disk and replaces `target` if the block succeeds."""
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
