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
    here, found = Path("pipelines/cli.py"), importlib.util.find_spec(name)
    if here.is_file() and found is not None and not here.samefile(found.origin):
        sys.exit(
            f"finercut: this folder is a clone with code of its own, and this command runs that of "
            f"{Path(found.origin).parents[1]}: `make setup` here, then `.venv/bin/finercut`"
        )
    importlib.import_module(name).main()
