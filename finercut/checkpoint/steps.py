"""What a step on a checkpoint is: it takes a model directory, writes one, and makes a claim that `prove` checks.

A step is a module of this package, named as the step is, with

    apply(parent: ModelDirectory, directory: Path, settings, inputs: Inputs) -> Record
        writes the new checkpoint into the empty `directory` and returns what the report says of it;
    claim(parent: ModelDirectory, child: ModelDirectory, proof: Proof) -> Claim
        checks what the step promises of its result.

`settings` is the step's section of params.yaml. A step whose settings have `method: none` is not asked: its checkpoint
is its parent's (`keep`). A step that changes anything appends to the lineage. docs/steps.md shows how to add one.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from finercut.checkpoint.records import KeptReport
from finercut.model.directory import ModelDirectory

if TYPE_CHECKING:
    import torch

    from finercut.model.costs import Costs
    from finercut.selection.selection import Selection
    from finercut.tokens import Tokens


@dataclass(frozen=True)
class Inputs:
    """What steps may use beside their parent; each is read when it is asked for."""

    tokens: Callable[[], Tokens]
    """Calibration and held-out tokens."""
    selection: Callable[[], Selection]
    whole: ModelDirectory
    work: Path
    """Folder of the step's own, for what an interrupted run continues from; it need not exist."""
    on_metrics: Callable[[Mapping[str, float], int], None] = lambda figures, step: None
    """Takes figures by name while the step works, and the number they belong to."""
    costs: Callable[[ModelDirectory], Costs] | None = None
    """Of a whole model; `prune` alone is given them."""


@dataclass(frozen=True)
class Proof:
    """What claims are checked with."""

    held_out: torch.Tensor
    """Token ids, (samples, tokens)."""
    logit_tolerance: float
    """Largest difference of two float32 logits that passes."""
    device: torch.device
    weights_gib: float | None = None
    """Of the device's memory, for a model's weights; None takes what they need."""
    whole: ModelDirectory | None = None
    """Needed by the claims of steps that change weights; so is `report`."""
    report: Path | None = None
    """Of the step whose claim is checked."""
    held_out_sources: Sequence[str] = ()
    """Of each held-out window; empty where all are from one."""


def step(name: str) -> ModuleType:
    """The module of a step.

    Raises:
        ValueError: there is no such step.
    """
    module = f"finercut.checkpoint.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # what the step itself imports
            raise
        raise ValueError(f"no step {name!r} on checkpoints: finercut/checkpoint/{name}.py is missing") from error


def keep(parent: ModelDirectory, directory: Path) -> KeptReport:
    """What every step does whose method is none. Imports nothing heavy."""
    link_files(parent.path, directory)
    return KeptReport(method="none", sha256=ModelDirectory(directory).weights_sha256)


def link_files(parent: Path, directory: Path) -> None:
    """Give every file of `parent` a second name in the empty `directory`; copies where the disk has no links."""
    for file in sorted(parent.rglob("*")):
        target = directory / file.relative_to(parent)
        if file.is_dir():
            target.mkdir()
            continue
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
