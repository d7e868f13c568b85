"""FinerCut makes decoder LLMs smaller and faster by removing the sublayers whose absence changes the output least.

Importing this package registers pruned checkpoints with transformers' Auto classes. It imports neither torch nor
transformers: the public names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from finercut.model.registration import register_when_imported  # noqa: TID251

__version__ = "0.2.0"

_HOME = {
    "Sublayer": "sublayers",
    "read_trajectory": "selection.trajectory",
    "search": "selection.greedy",
    "prune": "checkpoint.prune",
    "load_whole": "model.loading",
    "load_pruned": "model.loading",
    "masked": "model.masking",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"finercut.{_HOME[name]}"), name)
    raise AttributeError(f"module 'finercut' has no attribute {name!r}")


register_when_imported()
