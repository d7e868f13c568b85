"""Healing by local reconstruction: kept sublayers are trained, in order of depth, until the residual stream behind them
is the whole model's. Each starts from the closed-form refit where that has something to fit.

A step minimises the weighted squared difference from the target (see `finercut.selection.depth`) as a share of what it
was before: 1 is the pruned model, 0 the whole one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from finercut.healing import along_depth
from finercut.healing.schedule import order, rate
from finercut.healing.settings import Reconstruct
from finercut.healing.task import Healed, Task
from finercut.selection.depth import LEAST_GAIN, Depth, Fitted, Place
from finercut.selection.refit import ClosedForm


def heal(task: Task, settings: Reconstruct) -> Healed:
    """
    Raises:
        ValueError: a single window, or a batch smaller than a window.
        RuntimeError: values that are not finite.
    """
    n_tokens = task.windows.shape[1]
    settings.check(n_tokens)
    found = along_depth.heal(task, settings, lambda depth: Reconstruction(depth, settings))
    n_batch = settings.batch_tokens // n_tokens
    return Healed(found, settings.steps * n_batch * n_tokens if found else 0)


class Reconstruction:
    """Fits one unit after the other: a `Fit`.

    Each unit is a training of its own, of a hundred steps on tensors that are in memory: a plain optimizer. Trainer
    would make a dataset, an accelerator and checkpoints for every one of them.
    """

    def __init__(self, depth: Depth, settings: Reconstruct) -> None:
        self.depth = depth
        self.settings = settings
        self.refit = ClosedForm(depth, settings.ridges) if settings.ridges else None

    def __call__(self, place: Place) -> Fitted:
        """
        Raises:
            RuntimeError: values that are not finite.
        """
        start = Fitted({}, 0.0, "untrained") if self.refit is None else self.refit(place)
        if self.settings.sublayers == "gaps" and not place.at_gap:
            return start
        before, to_fit = (self._missing(place, part) for part in (self.depth.choosing, self.depth.fitting))
        if not math.isfinite(before + to_fit):
            raise RuntimeError(f"reconstruct: the stream at {place.name} is not finite")
        if not before or not to_fit:
            return start
        parameters = self.depth.parameters(place.unit)
        kept = {name: parameter.data for name, parameter in parameters.items()}
        try:
            values, step, left = self._trained(place, parameters, start, to_fit)
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(False)
                parameter.grad, parameter.data = None, kept[name]
        explained = 1 - left / before
        if explained < max(0.0, start.explained) + LEAST_GAIN:
            return start
        return Fitted(values, explained, f"step {step} of {self.settings.steps} (refit: {100 * start.explained:.1f} %)")

    def _trained(
        self, place: Place, parameters: dict[str, nn.Parameter], start: Fitted, to_fit: float
    ) -> tuple[dict[str, Tensor], int, float]:
        """The best evaluated values as they are stored, their step, and what is missing with them.

        Args:
            to_fit: what is missing in the pruned model, on the windows that are trained on.
        """
        settings, fitting = self.settings, self.depth.fitting
        dtypes = {}
        for name, parameter in parameters.items():
            own = self.depth.own(name)
            dtypes[name] = own.dtype
            parameter.data = start.judged.get(name, own).to(parameter.device, torch.float32, copy=True)
            parameter.requires_grad_()
        n_fitting = fitting.stop - fitting.start
        n_batch = self.depth.n_at_once
        scale = to_fit / n_fitting * n_batch
        windows = torch.tensor(order(n_fitting, settings.steps * n_batch, settings.seed)) + fitting.start
        optimizer = torch.optim.Adam(parameters.values())
        best: tuple[dict[str, Tensor], int, float] = ({}, 0, math.inf)
        for step, batch in enumerate(windows.split(n_batch), start=1):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate((step - 0.5) / settings.steps, settings.warm_up)
            with torch.enable_grad():
                loss = self._loss(place, batch) / scale
                if not loss.isfinite():
                    raise RuntimeError(
                        f"reconstruct: the loss of {place.name} is {loss.item()} in step {step}: lower "
                        "heal.learning_rate"
                    )
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % settings.eval_every == 0 or step == settings.steps:
                # As they would be stored: what rounding takes away is not gained.
                values = {name: p.detach().to(dtypes[name], copy=True) for name, p in parameters.items()}
                trained = {name: parameter.data for name, parameter in parameters.items()}
                for name, parameter in parameters.items():
                    parameter.data = values[name].float()
                left = self._missing(place, self.depth.choosing)
                for name, parameter in parameters.items():
                    parameter.data = trained[name]
                if left < best[2]:
                    best = {name: value.cpu() for name, value in values.items()}, step, left
        return best

    def _missing(self, place: Place, windows: slice) -> float:
        """What is missing behind the group with the present parameters, on some windows."""
        batches = torch.arange(windows.start or 0, windows.stop).split(self.depth.n_at_once)
        return math.fsum(self._loss(place, batch).item() for batch in batches)

    def _loss(self, place: Place, windows: Tensor) -> Tensor:
        device, dtype = self.depth.model.device, self.depth.model.dtype
        windows = windows.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            after = self.depth.through(place.group, place.before[windows], self.depth.removed)
        return (place.weights[windows] * (place.target[windows].float() - after.float()).square().sum(-1)).sum()
