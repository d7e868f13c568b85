"""The input and the output of a healing method: a module of this package with `heal(task, settings) -> Healed`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from finercut.healing.fidelity import HeldOut
from finercut.model.devices import device_of
from finercut.model.directory import ModelDirectory
from finercut.system.digests import code_sha256
from finercut.system.settings import Section

# The code that decides the result.
DECIDING = ("healing", "model", "selection", "sublayers.py", "tokens.py")

OnMetrics = Callable[[Mapping[str, float], int], None]
"""Takes figures by name, and the step they belong to."""


@dataclass(frozen=True)
class Task:
    whole: ModelDirectory
    pruned: ModelDirectory
    windows: Tensor
    """To fit or train on: token ids, (samples, tokens)."""
    held_out: HeldOut
    """To choose by."""
    device: torch.device
    dtype: torch.dtype
    """Of the whole model, and of matrix products."""
    work: Path
    """Where each set of inputs and settings has a folder for what an interrupted run continues from."""
    on_metrics: OnMetrics

    def folder(self, settings: Section) -> Path:
        """For what an interrupted run continues from; the name says all that decides the result: no other run does."""
        decides = {
            "settings": settings.model_dump(mode="json"),
            "models": [self.whole.weights_sha256, self.pruned.weights_sha256, self.pruned.settings],
            "windows": [_sha256(w.numpy().tobytes()) for w in (self.windows, self.held_out.windows)],
            "sources": list(self.held_out.sources),
            "shapes": [list(w.shape) for w in (self.windows, self.held_out.windows)],
            "computed": [str(self.dtype), self.device.type, torch.__version__, transformers.__version__],
            "code": code_sha256(DECIDING),
        }
        return self.work / _sha256(json.dumps(decides, sort_keys=True).encode())[:16]

    def stored(self, name: str) -> Tensor | None:
        """A parameter of the pruned model as its checkpoint stores it; None where it does under another name."""
        return self.pruned.tensor(name) if name in self.pruned.tensors else None


@dataclass(frozen=True)
class Healed:
    parameters: Mapping[str, Tensor]
    """New values of the pruned model's parameters, by their names in the model, in any dtype; those that are not here
    keep theirs. Empty if nothing was better than the pruned model."""
    n_tokens: int
    """Fitted or trained on, in all passes, up to these values."""


def one_device(name: str) -> torch.device:
    """
    Raises:
        ValueError: no such device here, or not the first GPU, which is the only one that is trained on.
    """
    device = device_of(name)
    if device.type == "cuda" and device.index != 0:
        raise ValueError(f"cannot heal on {device}: only on the first GPU; choose with CUDA_VISIBLE_DEVICES")
    return device


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
