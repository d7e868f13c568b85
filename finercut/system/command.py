"""The command `finercut`: starts the command line of a clone, or of the wheel that is installed."""

from __future__ import annotations

import importlib
import importlib.util


def main() -> None:
    # A wheel has the pipeline inside this package; in a clone it lies beside it.
    inside = importlib.util.find_spec("finercut.pipelines") is not None
    importlib.import_module("finercut.pipelines.cli" if inside else "pipelines.cli").main()
