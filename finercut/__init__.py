"""FinerCut: decoder LLMs made smaller and faster by removing the sublayers they miss least.

Importing this package is all it takes for transformers' Auto classes to load pruned checkpoints. It imports neither
torch nor transformers itself: the names below come when they are used, the registration when the Auto classes do.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

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


_REGISTER = {
    "transformers.models.auto.configuration_auto": "register_configs",
    "transformers.models.auto.modeling_auto": "register_models",
}


def _register(imported: str) -> None:
    getattr(importlib.import_module("finercut.model.families"), _REGISTER[imported])()


class _RegisterAfter(MetaPathFinder, Loader):
    """Imports one module as ever, then registers: to register at once would import torch on `finercut --help`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(self.name)


for _name in _REGISTER:
    if _name in sys.modules:
        _register(_name)
    else:
        sys.meta_path.insert(0, _RegisterAfter(_name))
