"""The input and the output of a healing method: a module of this package with `heal(task, settings) -> Healed`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finercut.model.devices import device_of
from finercut.model.directory import ModelDirectory

OnMetrics = Callable[[Mapping[str, float], int], None]
"""Takes figures by name, and the step they belong to."""


@dataclass(frozen=True)
class Task:
    whole: ModelDirectory
    pruned: ModelDirectory
    windows: Tensor
    """To fit or train on: token ids, (samples, tokens)."""
    held_out: Tensor
    """To choose by: token ids, (samples, tokens)."""
    work: Path
    """Folder for what an interrupted run continues from."""
    on_metrics: OnMetrics


@dataclass(frozen=True)
class Healed:
    parameters: Mapping[str, Tensor]
    """New values of the pruned model's parameters, by their names in the model, in any dtype; those that are not here
    keep theirs. Empty if nothing was better than the pruned model."""
    n_tokens: int
    """Fitted or trained on, repeats included, up to these values."""


def one_device(name: str) -> torch.device:
    """
    Raises:
        ValueError: no such device here, or not the first GPU, which is the only one that is trained on.
    """
    device = device_of(name)
    if device.type == "cuda" and device.index != 0:
        raise ValueError(f"cannot heal on {device}: only on the first GPU; choose with CUDA_VISIBLE_DEVICES")
    return device
