"""The command `finercut`: starts the command line of a clone, or of the wheel that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def main() -> None:
    # A wheel has the pipeline inside this package; in a clone it lies beside it.
    inside = importlib.util.find_spec("finercut.pipelines") is not None
    name = "finercut.pipelines.cli" if inside else "pipelines.cli"
    if Path("pipelines/cli.py").is_file() and not inside:
        _check_clone(Path.cwd(), Path(importlib.util.find_spec(name).origin).parents[1])
    importlib.import_module(name).main()


def _check_clone(here: Path, clone: Path) -> None:
    """Exit where the current directory is a clone with other code than the one that this command runs: `dvc repro`
    would run the one, and `finercut run` the other's registration."""
    if not here.samefile(clone) and _code(here) != _code(clone):
        sys.exit(
            f"finercut: the code in this folder is another than that of {clone}, which this command runs: `make setup` "
            "here, then `.venv/bin/finercut`; in a container, an image of this code"
        )


def _code(root: Path) -> dict[Path, bytes]:
    files = (file for package in ("finercut", "pipelines") for file in (root / package).rglob("*.py"))
    return {file.relative_to(root): file.read_bytes() for file in files}
