#!/usr/bin/env python3
"""Carries out the Dockerfile without a container engine: the same instructions, in a chroot on a clean Debian.

    sudo trials/dockerfile.py --root /tmp/worker [--target worker] [--hardware cpu] [--bind PATH]... -- finercut --help

Builds the target under ROOT and then runs ENTRYPOINT with the command as the image's user. Debian's own Python 3.11
stands for the base image's, mounts of secrets are left out, and layers, namespaces and limits are not tried. PIP_*
variables are passed on, and --bind makes a path of this machine visible inside (a folder of wheels, a certificate).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BASE_PACKAGES = "ca-certificates,python3-dev,python3-venv"
# What a container sees of the machine it runs on.
HOST = ("/dev", "/sys", "/etc/resolv.conf")
KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "HEALTHCHECK", "RUN", "SHELL", "USER", "VOLUME", "WORKDIR"}


@dataclass
class Image:
    """What the instructions so far add up to, apart from files."""

    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    user: str = "root"
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)


def instructions(text: str) -> list[tuple[str, str]]:
    """Keyword and argument of each, comments dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    unknown = {keyword for keyword, _, _ in found} - KNOWN
    if unknown:
        raise ValueError(f"Dockerfile: {', '.join(sorted(unknown))} is not an instruction known here")
    return [(keyword, argument.strip()) for keyword, _, argument in found]


def chain(text: str, target: str, arguments: dict[str, str]) -> list[tuple[str, str]]:
    """The instructions from the first base image to the end of `target`, stage after stage."""
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    current: list[tuple[str, str]] = []
    for keyword, argument in instructions(text):
        if keyword == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", argument).groups()
            current = []
            stages[name] = (expand(parent, arguments), current)
        elif keyword == "ARG":
            name, _, default = argument.partition("=")
            arguments.setdefault(name, default)
        else:
            current.append((keyword, argument))
    parent, steps = stages[target]
    while parent in stages:
        parent, earlier = stages[parent]
        steps = [*earlier, *steps]
    return steps


def expand(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], ""), text)


def context_files(ignored: str) -> list[Path]:
    """What `COPY . .` may see: .dockerignore here names what is kept, and patterns below that are dropped."""
    kept, dropped = [], []
    for line in ignored.splitlines():
        if line.startswith("!"):
            kept.append(line[1:])
        elif line not in ("", "*") and not line.startswith("#"):
            dropped.append(line.removeprefix("**/"))
    files = [path for name in kept for path in [PROJECT / name, *(PROJECT / name).rglob("*")] if path.is_file()]
    relative = [path.relative_to(PROJECT) for path in files]
    return [path for path in relative if not any(fnmatch.fnmatch(part, d) for part in path.parts for d in dropped)]


class Chroot:
    """Carries the instructions out under a directory."""

    def __init__(self, root: Path, binds: list[Path], arguments: dict[str, str]) -> None:
        self.root, self.binds, self.arguments, self.image = root, binds, arguments, Image()

    def apply(self, keyword: str, argument: str) -> None:
        image = self.image
        if keyword == "ENV":
            for assignment in shlex.split(argument):
                name, _, value = assignment.partition("=")
                image.environment[name] = expand(value, image.environment)
        elif keyword == "SHELL":
            image.shell = json.loads(argument)
        elif keyword == "USER":
            image.user = argument
        elif keyword == "WORKDIR":
            image.workdir = argument
            (self.root / argument.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif keyword == "COPY":
            self.copy(argument)
        elif keyword == "RUN":
            command = re.sub(r"--mount=\S+\s+", "", argument)
            self.run([*image.shell, command], self.arguments | pip_settings())
        elif keyword in ("ENTRYPOINT", "CMD"):
            setattr(image, {"ENTRYPOINT": "entrypoint", "CMD": "command"}[keyword], json.loads(argument))
        elif keyword == "HEALTHCHECK":
            image.healthcheck = json.loads(argument.partition("CMD ")[2])

    def copy(self, argument: str) -> None:
        source, target = argument.split()
        place = self.root / self.image.workdir.lstrip("/") / target
        for file in context_files((PROJECT / ".dockerignore").read_text()):
            if source == "." or file.is_relative_to(source):
                to = place / (file if source == "." else file.relative_to(source))
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT / file, to)

    def run(self, command: list[str], extra: dict[str, str]) -> None:
        """Show a command, and run it `inside`."""
        print(f"[{self.image.user}] {shlex.join(command)[:200]}", flush=True)
        subprocess.run(self.inside(command, extra), check=True)

    def inside(self, command: list[str], extra: dict[str, str]) -> list[str]:
        """What runs a command in the image's directory, as its user, with nothing of this machine's environment."""
        home = "/root" if self.image.user == "root" else "/home/finercut"
        environment = {"HOME": home, **self.image.environment, **extra}
        words = ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
        inside = f"cd {shlex.quote(self.image.workdir)} && exec {shlex.join(command)}"
        user = "0:0" if self.image.user == "root" else f"{self.image.user}:{self.image.user}"
        mounts = "".join(self.mount(path) for path in [*map(Path, HOST), *self.binds])
        mounts += f"mount -t proc proc {self.root}/proc\nmount -t tmpfs -o mode=1777 shm {self.root}/dev/shm\n"
        script = f'set -e\n{mounts}exec chroot --userspec={user} {self.root} "$@"'
        # Mounts in a namespace of their own: they go with the command, however it ends.
        outer = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh"]
        return [*outer, *words, "sh", "-c", inside]

    def mount(self, path: Path) -> str:
        place = self.root / path.relative_to("/")
        make = f"mkdir -p {place}" if path.is_dir() else f"mkdir -p {place.parent}\ntouch -a {place}"
        return f"{make}\nmount --bind {path} {place}\n"


def give(folder: Path, user: str) -> None:
    """Make `user`, and the group of that number, the owner of everything in a folder."""
    subprocess.run(["chown", "-R", "-h", f"{user}:{user}", folder], check=True)


def pip_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


def container_of(root: Path, target: str, hardware: str, binds: list[Path], built: bool) -> Chroot:
    """Of a clean Debian, or of one that the target was `built` in."""
    container = Chroot(root, binds, {"HARDWARE": hardware})
    for keyword, argument in chain((PROJECT / "Dockerfile").read_text(), target, container.arguments):
        if not built or keyword not in ("RUN", "COPY"):
            container.apply(keyword, argument)
    return container


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--target", default="worker")
    parser.add_argument("--hardware", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bind", type=Path, action="append", default=[])
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE for the command")
    parser.add_argument("--built", action="store_true", help="only run the command, in what is under ROOT already")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    root = options.root.resolve()
    if not (root / "usr").exists():
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", root], check=True)
    container = container_of(root, options.target, options.hardware, options.bind, options.built)
    command = options.command or container.image.command
    if command == ["HEALTHCHECK"]:
        entry, command = [], container.image.healthcheck
    else:
        entry = container.image.entrypoint
    container.run([*entry, *command], dict(item.split("=", 1) for item in options.env))


if __name__ == "__main__":
    sys.exit(main())
