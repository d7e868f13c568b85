"""What machines have set otherwise than the libraries expect, put right before they are imported.

Every process that a command starts inherits it.
"""

from __future__ import annotations

import logging
import os
import pwd
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

logger = logging.getLogger("finercut")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PLUGIN = "finercut"
# The path of a Unix socket has 107 bytes at most; what vLLM puts into the folder, vllm-XXXXXXXX/UUID, takes 51 of them.
LONGEST_TMPDIR = 56


def prepare(environment: MutableMapping[str, str], work: Path) -> None:
    """
    Args:
        environment: this process's, changed.
        work: a folder of ours, for a user without a home to write to.
    """
    _loopback_without_proxy(environment)
    _plugin_among_the_chosen(environment)
    _a_name_for_the_user(environment)
    _a_home_to_write_to(environment, work)
    _a_short_folder_for_sockets(environment)


def _loopback_without_proxy(environment: MutableMapping[str, str]) -> None:
    """The servers that a run starts are on this machine: no proxy knows them."""
    named = [environment.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    hosts = [host.strip() for value in named for host in value.split(",") if host.strip()]
    if "*" not in hosts:
        hosts = list(dict.fromkeys([*hosts, *LOOPBACK]))
        environment["no_proxy"] = environment["NO_PROXY"] = ",".join(hosts)


def _plugin_among_the_chosen(environment: MutableMapping[str, str]) -> None:
    chosen = environment.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in (names := [name.strip() for name in chosen.split(",") if name.strip()]):
        environment["VLLM_PLUGINS"] = ",".join([*names, PLUGIN])
        logger.warning("VLLM_PLUGINS = %r leaves out finercut's plugin; it is added for this command", chosen)


def _a_name_for_the_user(environment: MutableMapping[str, str]) -> None:
    """torch and MLflow ask for it; a container's user id often has none."""
    if not any(environment.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            environment["USER"] = f"uid{os.getuid()}"


def _a_home_to_write_to(environment: MutableMapping[str, str], work: Path) -> None:
    """Caches and settings of the libraries go there, unless their own variables say otherwise."""
    home = environment.get("HOME") or os.path.expanduser("~")
    if not os.access(home, os.W_OK | os.X_OK):
        ours = (work / "home").absolute()
        ours.mkdir(parents=True, exist_ok=True)
        environment["HOME"] = str(ours)
        logger.warning("the home directory %s cannot be written to: taking %s", home, ours)


def _a_short_folder_for_sockets(environment: MutableMapping[str, str]) -> None:
    folder = environment.get("TMPDIR")
    if folder and len(os.fsencode(folder)) > LONGEST_TMPDIR:
        short = next((place for place in ("/tmp", "/var/tmp", "/dev/shm") if os.access(place, os.W_OK | os.X_OK)), None)
        if short is None:
            raise ValueError(
                f"TMPDIR has {len(os.fsencode(folder))} bytes, and sockets of vLLM and Python need a path of at most "
                f"{LONGEST_TMPDIR}: set it to a shorter one"
            )
        environment["TMPDIR"] = short
        tempfile.tempdir = None
        logger.warning("TMPDIR %s is too long for the sockets of vLLM and Python: taking %s", folder, short)
