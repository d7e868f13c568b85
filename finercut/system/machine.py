"""Makes what a machine lacks, or says what to set: every command calls `prepare` before it does anything.

Only this process and those it starts are changed, through the environment.
"""

from __future__ import annotations

import getpass
import hashlib
import logging
import os
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger("finercut")

_PROXIES = [name for lower in ("http_proxy", "https_proxy", "all_proxy") for name in (lower, lower.upper())]
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# A Unix socket's path has at most 107 bytes; below a temporary folder vLLM's take 51 and multiprocessing's 33.
LONGEST_TEMPORARY = 107 - 51
# What is outside of this, shell lines such as those of PyTorch's compiler do not take unquoted.
_PLAIN = re.compile(r"[\w/.+@:=,-]+", re.ASCII)
_PLUGIN = "finercut"


def prepare() -> None:
    """
    Raises:
        RuntimeError: what the user has to set or install; one line.
        FileNotFoundError: no temporary folder can be written to.
    """
    _keep_loopback_direct()
    _settle_temporary_folder()
    _settle_user()
    _keep_plugin()


def plain_path(path: Path) -> Path:
    """`path`, or a link to it that a shell line takes unquoted.

    Raises:
        RuntimeError: there is no folder for the link.
    """
    return path if _PLAIN.fullmatch(str(path)) else _link(path)


def interpreter() -> str:
    """The path of this Python, without what PyTorch's compiler, which does not quote it, cannot take.

    An environment takes its place from the path that it is started by, so a link to it will do.

    Raises:
        RuntimeError: there is no folder for the link.
    """
    program = Path(sys.executable)
    environment = Path(sys.prefix)
    if not program.is_relative_to(environment):
        return str(program)
    return str(plain_path(environment) / program.relative_to(environment))


def _keep_loopback_direct() -> None:
    """Let no proxy stand between us and our own servers."""
    given = {name: os.environ[name] for name in _PROXIES if os.environ.get(name)}
    if not given:
        return
    for name, address in given.items():
        if address.lower().startswith("socks") and not all(map(find_spec, ("socksio", "socks"))):
            raise RuntimeError(
                f"{name} names a SOCKS proxy, which needs two more packages: "
                "pip install socksio pysocks, or name an HTTP proxy"
            )
    # Python's own reader prefers the lower case, so that must not lose what the upper case alone says.
    common = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host.strip() for host in os.environ.get(name, common).split(",") if host.strip()]
        if "*" not in hosts:
            hosts += [host for host in _LOOPBACK if host not in hosts]
        os.environ[name] = ",".join(hosts)


def _settle_temporary_folder() -> None:
    """Give TMPDIR a value that exists and that sockets and compilers can use."""
    set_to = os.environ.get("TMPDIR")
    tempfile.tempdir = None  # what Python found before TMPDIR was set, if it was
    found = tempfile.gettempdir()
    if set_to and os.path.abspath(set_to) != found:
        logger.warning("TMPDIR is %s, where nothing can be written: temporary files go to %s", set_to, found)
        os.environ["TMPDIR"] = found
    if len(os.fsencode(found)) > LONGEST_TEMPORARY or not _PLAIN.fullmatch(found):
        os.environ["TMPDIR"] = tempfile.tempdir = str(_link(Path(found)))


def _settle_user() -> None:
    """A name and a home for users that the machine does not know, as in containers, or whose home is read-only."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = os.environ["LOGNAME"] = f"user-{os.getuid()}"
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and _can_be_written(home):
        if home.is_dir() and (plain := plain_path(home)) != home:
            os.environ["HOME"] = str(plain)  # vLLM's compiled files are there
        return
    ours = _own_folder(Path(tempfile.gettempdir()))
    if ours is None:
        raise RuntimeError(f"the home folder {home} cannot be written to: set HOME to a folder that can")
    logger.warning("the home folder %s cannot be written to: caches go to %s; or set HOME", home, ours)
    # What is only read stays where it is.
    for name, file in (
        ("HF_TOKEN_PATH", os.path.join(os.environ.get("HF_HOME", home / ".cache/huggingface"), "token")),
        ("GIT_CONFIG_GLOBAL", home / ".gitconfig"),
        ("NETRC", home / ".netrc"),
    ):
        if os.access(file, os.R_OK):
            os.environ.setdefault(name, str(file))
    os.environ["HOME"] = str(ours)


def _keep_plugin() -> None:
    """vLLM loads the plugin that knows pruned models only if VLLM_PLUGINS, where set, names it."""
    given = os.environ.get("VLLM_PLUGINS")
    if given is not None and _PLUGIN not in given.split(","):
        logger.warning("VLLM_PLUGINS is %r: finercut is added, without which vLLM knows no pruned models", given)
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, (given, _PLUGIN)))


def _can_be_written(folder: Path) -> bool:
    """Whether it can, or can be made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _link(target: Path) -> Path:
    """A short and plain name for `target`, the same each time."""
    for folder in filter(None, map(_own_folder, map(Path, ("/tmp", "/var/tmp", "/dev/shm")))):
        link = folder / hashlib.sha256(os.fsencode(target)).hexdigest()[:8]
        try:
            link.symlink_to(target)
        except FileExistsError:
            if not link.is_symlink() or Path(os.readlink(link)) != target:
                continue
        return link
    raise RuntimeError(
        f"{target} is too long for sockets or has characters that compilers do not take, and /tmp cannot be written "
        f"to for a link to it: use a path of at most {LONGEST_TEMPORARY} letters, digits and -_./"
    )


def _own_folder(parent: Path) -> Path | None:
    """A folder in `parent` that only this user can change; None where there can be none."""
    folder = parent / f"finercut-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    ours = status.st_uid == os.getuid() and not status.st_mode & 0o022 and not folder.is_symlink()
    return folder if ours and os.access(folder, os.W_OK) else None
