"""Makes what a machine lacks, or says what to set: every command calls `prepare` before it does anything.

Only this process and those it starts are changed, through the environment.
"""

from __future__ import annotations

import getpass
import hashlib
import ipaddress
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

logger = logging.getLogger("finercut")

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Of the proxies that Prefect's client reads, whatever the host, the kinds that it knows.
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_PROXY_KINDS = ("http", "https", "socks5", "socks5h")
# Servers of ours may be at another loopback address.
_SERVERS = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")
# Where libraries keep caches, compilers' files among them, other than in the home folder.
_CACHES = ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
# A Unix socket's path has at most 107 bytes; below a temporary folder vLLM's take 51 and multiprocessing's 33.
LONGEST_TEMPORARY = 107 - 51
# What is outside of this, shell lines such as those of PyTorch's compiler do not take unquoted.
_PLAIN = re.compile(r"[\w/.+@:=,-]+", re.ASCII)
_PLUGIN = "finercut"
_NO_SHELLS = ("nologin", "false", "true")


def prepare() -> None:
    """
    Raises:
        RuntimeError: what the user has to set or install; one line.
        FileNotFoundError: no temporary folder can be written to.
    """
    if sys.flags.optimize > 1:
        raise RuntimeError(
            "PYTHONOPTIMIZE is 2, or python was started with -OO, which takes away the docstrings that transformers "
            "reads: unset it, or set it to 1"
        )
    if any(option.startswith("error") for option in sys.warnoptions):
        raise RuntimeError(
            "PYTHONWARNINGS, or python -W, makes errors of warnings, and libraries here warn each other: unset it"
        )
    _check_logging()
    os.environ["MPLBACKEND"] = "agg"  # pictures are files; a notebook's own is not known to the library here
    _keep_loopback_direct()
    _settle_temporary_folder()
    _settle_user()
    _settle_caches()
    _settle_shell()
    _settle_threads()
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


def _check_logging() -> None:
    """Each library takes its own when it is imported, and does not say whose it was."""
    levels = logging.getLevelNamesMapping()
    for name in ("MLFLOW_LOGGING_LEVEL", "PREFECT_LOGGING_LEVEL", "VLLM_LOGGING_LEVEL"):
        if (given := os.environ.get(name)) and given.upper() not in levels:
            raise RuntimeError(f"{name} is {given}, and levels are {', '.join(levels)}: set one of them, or unset it")
    settings = os.environ.get("VLLM_LOGGING_CONFIG_PATH")
    if settings and not Path(settings).is_file():
        raise RuntimeError(f"VLLM_LOGGING_CONFIG_PATH is {settings}, where no file is: name one, or unset it")


def _keep_loopback_direct() -> None:
    """Let no proxy stand between us and our own servers."""
    set_to = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy") and value}
    given = {name: value for name, value in set_to.items() if name.lower() != "no_proxy"}
    if not set_to:
        return
    _check_proxies(given)
    ours = [*_LOOPBACK, *_own_addresses()] if given else []
    # Python's own reader prefers the lower case, so that must not lose what the upper case alone says.
    common = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [_plain_host(host.strip()) for host in os.environ.get(name, common).split(",")]
        hosts = list(dict.fromkeys(filter(None, hosts)))
        if "*" not in hosts:
            hosts += [host for host in ours if host not in hosts]
        os.environ[name] = ",".join(hosts)


def _check_proxies(given: Mapping[str, str]) -> None:
    """
    Raises:
        RuntimeError: Prefect's client cannot use one of them.
    """
    for name, address in given.items():
        kind, separator, _ = address.lower().partition("://")
        if name.lower() not in _PROXIES or not separator:
            continue
        if kind not in _PROXY_KINDS:
            raise RuntimeError(f"{name} names a proxy of kind {kind}://; {', '.join(_PROXY_KINDS)} can be used")
        if kind.startswith("socks") and not all(map(find_spec, ("socksio", "socks"))):
            raise RuntimeError(
                f"{name} names a SOCKS proxy, which needs two more packages: "
                "pip install socksio pysocks, or name an HTTP proxy"
            )


def _own_addresses() -> list[str]:
    """Hosts of _SERVERS that are this machine."""
    found = []
    for name in _SERVERS:
        with suppress(ValueError):
            host = urlsplit(os.environ.get(name, "")).hostname or ""
            address = None if host.endswith(("localhost", ".localdomain")) else ipaddress.ip_address(host)
            if address is None or address.is_loopback or address.is_unspecified:
                found.append(host)
    return found


def _plain_host(host: str) -> str | None:
    """An entry of NO_PROXY as httpx reads it, which fails on brackets and on networks of IPv6 addresses."""
    if bracketed := re.fullmatch(r"\[(.*)\](?::\d+)?", host):
        return bracketed[1]
    return None if ":" in host.partition("/")[0] and "/" in host and "://" not in host else host


def _settle_temporary_folder() -> None:
    """Give TMPDIR a value that exists and that sockets and compilers can use."""
    set_to = os.environ.get("TMPDIR")
    tempfile.tempdir = None  # what Python found before TMPDIR was set, if it was
    found = tempfile.tempdir = os.path.abspath(tempfile.gettempdir())
    if set_to:
        if os.path.abspath(set_to) != found:
            logger.warning("TMPDIR is %s, where nothing can be written: temporary files go to %s", set_to, found)
        os.environ["TMPDIR"] = found  # also where it was relative to this folder
    if len(os.fsencode(found)) > LONGEST_TEMPORARY or not _PLAIN.fullmatch(found):
        os.environ["TMPDIR"] = tempfile.tempdir = str(_link(Path(found)))


def _settle_user() -> None:
    """A name and a home for users that the machine does not know, as in containers, or whose home is read-only."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = os.environ["LOGNAME"] = f"user-{os.getuid()}"
    if os.environ.get("HOME") == "":
        del os.environ["HOME"]
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
        ("AWS_SHARED_CREDENTIALS_FILE", home / ".aws/credentials"),
        ("AWS_CONFIG_FILE", home / ".aws/config"),
        ("DVC_GLOBAL_CONFIG_DIR", home / ".config/dvc"),
        ("PREFECT_PROFILES_PATH", home / ".prefect/profiles.toml"),
    ):
        if os.access(file, os.R_OK):
            os.environ.setdefault(name, str(file))
    os.environ["HOME"] = str(ours)


def _settle_caches() -> None:
    """Give the variables that name cache folders values that can be written to and that compilers can use."""
    if os.statvfs(tempfile.gettempdir()).f_flag & os.ST_NOEXEC:  # where PyTorch would compile, and load what it made
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/torchinductor"))
    for name in _CACHES:
        if not (given := os.environ.get(name)):
            continue
        folder = Path(given).absolute()
        if not _can_be_written(folder):
            logger.warning("%s is %s, which cannot be written to: it is passed over", name, given)
            del os.environ[name]
        elif not _PLAIN.fullmatch(given):
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[name] = str(plain_path(folder))


def _settle_shell() -> None:
    """DVC runs the command of a stage in SHELL, which for the user of a service can be one that refuses."""
    shell = os.environ.get("SHELL")
    if shell and (os.path.basename(shell) in _NO_SHELLS or shutil.which(shell) is None):
        logger.warning("SHELL is %s, which runs no commands: stages are started by /bin/sh", shell)
        os.environ["SHELL"] = "/bin/sh"


def _settle_threads() -> None:
    """vLLM hands what OMP_NUM_THREADS says to torch, which fails on what is no number of threads."""
    given = os.environ.get("OMP_NUM_THREADS")
    if given is not None and not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", given):
        logger.warning("OMP_NUM_THREADS is %r, which is no number of threads: it is passed over", given)
        del os.environ["OMP_NUM_THREADS"]


def _keep_plugin() -> None:
    """vLLM loads the plugin that knows pruned models only if VLLM_PLUGINS, where set, names it."""
    given = os.environ.get("VLLM_PLUGINS")
    if given is not None and _PLUGIN not in given.split(","):
        logger.warning("VLLM_PLUGINS is %r: finercut is added, without which vLLM knows no pruned models", given)
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, (given, _PLUGIN)))


def _can_be_written(folder: Path) -> bool:
    """Whether it can, or can be made."""
    # Where this user may not look, os.path says no, and pathlib fails.
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
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
