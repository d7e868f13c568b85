"""Closed-form refit: what kept sublayers write to the residual stream is fitted, in order of depth.

At each kept sublayer (see `depth`), the output projection W, which writes W a to the stream, becomes W + dW with

    dW = R A' (A A' + ridge D)^-1

where the columns of A are the projection's inputs, those of R what is missing in the stream, a column a token, and D is
the diagonal of A A': a ridge towards the present weights. Where a norm follows the projection (Gemma, OLMo 2), its gain
is fitted instead, each channel for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finercut.model.families import Layout, layout_of
from finercut.selection.blocks import Unit
from finercut.selection.depth import LEAST_GAIN, Depth, Fitted, Place
from finercut.selection.depth import check as check_depth
from finercut.sublayers import Sublayer

logger = logging.getLogger("finercut")

# Added to D as a share of its mean, for inputs that are always zero.
LEAST_DIAGONAL = 1e-4
# Largest relative difference between a norm's output and what its weight says.
NORM_TOLERANCE = 0.05
# Fewer tokens than this many times a projection's inputs are warned of.
TOKENS_PER_INPUT = 4


def fits(layout: Layout, config: PreTrainedConfig) -> bool:
    """Whether sublayers of such a model can be fitted one after the other."""
    try:
        check(layout, config.model_type)
        check_depth(config)
    except ValueError:
        return False
    return True


def check(layout: Layout, model_type: str) -> None:
    """
    Raises:
        ValueError: sublayers that run in parallel.
    """
    if not layout.sequential:
        raise ValueError(
            f"refit cannot fit a {model_type} model, whose blocks are not an attention followed by an MLP: take "
            "heal.method reconstruct or distill, and no search.refit"
        )


def fit(
    model: PreTrainedModel, windows: Tensor, removed: Iterable[Sublayer], ridges: Sequence[float], batch_tokens: int
) -> Depth:
    """Fit the kept sublayers of the whole `model` from the first gap on.

    Args:
        windows: token ids, (samples, tokens), on the model's device.
        ridges: see `Refit`.

    Returns:
        What undoes it.

    Raises:
        ValueError: sublayers that run in parallel, or a single window.
        RuntimeError: values that are not finite.
    """
    check(layout_of(model.config), model.config.model_type)
    depth = Depth(model, windows, removed, batch_tokens)
    depth.run(ClosedForm(depth, ridges))
    return depth


class ClosedForm:
    """Fits one unit after the other: a `Fit`."""

    def __init__(self, depth: Depth, ridges: Sequence[float]) -> None:
        self.depth = depth
        self.ridges = ridges
        self.names = {id(module): name for name, module in depth.model.named_modules()}
        self.warned = False

    def __call__(self, place: Place) -> Fitted:
        """
        Raises:
            RuntimeError: values that are not finite.
        """
        written = self._written(place)
        if written is None:
            return Fitted({}, 0.0, "what it writes is not one projection's output")
        seen, unseen = written.moments(), written.moments()
        for part, moments in ((self.depth.fitting, seen), (self.depth.choosing, unseen)):
            batches = (x[part].split(self.depth.n_at_once) for x in (place.before, place.target, place.weights))
            for states, target, weights in zip(*batches, strict=True):
                features, after = self._run(written, place.unit, states)
                moments.add(features, (target.float() - after.float()).flatten(0, 1), weights.flatten())
        best = max(self.ridges, key=lambda ridge: unseen.explained(seen.solve(ridge)))
        change = seen.solve(best)
        explained = unseen.explained(change)
        if explained != explained:
            raise RuntimeError(f"refit: the stream at {place.name} is not finite")
        if explained < LEAST_GAIN:
            return Fitted({}, explained, "refit")
        seen.merge(unseen)
        own = self.depth.own(written.name)
        values, judged = (
            {written.name: written.changed(own.float(), solved.float()).to(own.dtype).cpu()}
            for solved in (seen.solve(best), change)
        )
        return Fitted(values, explained, f"ridge {best:g}", judged)

    def _run(self, written: _Written, unit: Unit, states: Tensor) -> tuple[Tensor, Tensor]:
        """The features (tokens, features), float32, and the stream after the unit."""
        caught: list[Tensor] = []
        hook = written.module.register_forward_hook(lambda _, *call: caught.append(written.feature(*call)))
        try:
            after = self.depth.blocks.run(unit, states, ())
        finally:
            hook.remove()
        return written.factor * caught[-1].flatten(0, -2).float(), after

    def _written(self, place: Place) -> _Written | None:
        """What the unit's output is linear in; None if there is nothing of that kind."""
        unit, states = place.unit, place.before[: self.depth.n_at_once]
        if len(unit.sublayers) > 1:
            return None
        (sublayer,) = unit.sublayers
        branch = self.depth.layout.branch(sublayer.kind, sublayer.block)
        block = self.depth.blocks.modules[unit.module]
        if branch.beside:
            return None
        core = block.get_submodule(branch.core)
        last = block.get_submodule(branch.after[-1]) if branch.after else None
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            calls.append((module, args[0] if args else output, output))

        projections = [m for m in core.modules() if isinstance(m, (nn.Linear, Conv1D))]
        watched = {id(m): m for m in [*projections, core, *([] if last is None else [last])]}
        hooks = [module.register_forward_hook(keep) for module in watched.values()]
        try:
            after = self.depth.blocks.run(unit, states, ())
        finally:
            for hook in hooks:
                hook.remove()
        if last is not None:
            read, output = next((i, o) for module, i, o in reversed(calls) if module is last)
            offset = _gain_offset(last, read, output)
            if offset is None:
                return None
            factor = _factor(after.float() - states.float(), output.float())
            return _Gain(f"{self.names[id(last)]}.weight", last, last.weight, factor, offset)
        of_core = next(o for module, _, o in reversed(calls) if module is core)
        last_called = next((call for call in reversed(calls) if isinstance(call[0], (nn.Linear, Conv1D))), None)
        if last_called is None or last_called[2].numel() != of_core.numel():
            return None
        module, _, output = last_called
        if not torch.equal(output.reshape(of_core.shape), of_core):
            return None
        n_inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
        n_tokens = self.depth.windows.numel()
        if n_tokens < TOKENS_PER_INPUT * n_inputs and not self.warned:
            logger.warning(
                "refit: the projection of %s has %d inputs; %d tokens are few", place.name, n_inputs, n_tokens
            )
            self.warned = True
        factor = _factor(after.float() - states.float(), output.float().reshape(states.shape))
        return _Projection(f"{self.names[id(module)]}.weight", module, module.weight, factor)


@dataclass(frozen=True)
class _Written:
    """A parameter that the output of a sublayer is linear in."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    factor: float
    """Between the module's output and what is added to the stream."""


class _Projection(_Written):
    def feature(self, args: tuple, output: Tensor) -> Tensor:
        return args[0]

    def moments(self) -> _Full:
        return _Full()

    def changed(self, value: Tensor, change: Tensor) -> Tensor:
        return value + (change.T if isinstance(self.module, Conv1D) else change)


@dataclass(frozen=True)
class _Gain(_Written):
    offset: float
    """Gain less the stored weight."""

    def feature(self, args: tuple, output: Tensor) -> Tensor:
        return output

    def moments(self) -> _Diagonal:
        return _Diagonal()

    def changed(self, value: Tensor, change: Tensor) -> Tensor:
        return value + (value + self.offset) * change


class _Full:
    """Sums over tokens for a change (outputs, features) of a matrix."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.missing = 0.0

    def add(self, features: Tensor, missing: Tensor, weights: Tensor) -> None:
        """
        Args:
            features: (tokens, features)
            missing: (tokens, outputs)
            weights: (tokens,)
        """
        features, missing = features * weights.sqrt()[:, None], missing * weights.sqrt()[:, None]
        self.gram = self.gram + self._gram(features).double()
        self.cross = self.cross + self._cross(missing, features).double()
        self.missing += missing.double().square().sum().item()

    def merge(self, other: _Full) -> None:
        self.gram, self.cross = self.gram + other.gram, self.cross + other.cross
        self.missing += other.missing

    def explained(self, change: Tensor) -> float:
        """Share of what is missing that the change adds."""
        if not self.missing:
            return 0.0
        return ((2 * change * self.cross).sum() - (change * self._times_gram(change)).sum()).item() / self.missing

    def _gram(self, features: Tensor) -> Tensor:
        return features.T @ features

    def _cross(self, missing: Tensor, features: Tensor) -> Tensor:
        return missing.T @ features

    def _times_gram(self, change: Tensor) -> Tensor:
        return change @ self.gram

    def solve(self, ridge: float) -> Tensor:
        """The change; none where the ridge is too small for inputs that depend on each other."""
        diagonal = self.gram.diagonal()
        scale = (diagonal + LEAST_DIAGONAL * diagonal.mean()).rsqrt()
        scaled = scale[:, None] * self.gram * scale
        scaled.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if failed:
            return torch.zeros_like(self.cross)
        return torch.cholesky_solve((self.cross * scale).T, factor).T * scale


class _Diagonal(_Full):
    """Sums over tokens for a change (channels,) that multiplies each channel."""

    def _gram(self, features: Tensor) -> Tensor:
        return features.square().sum(0)

    def _cross(self, missing: Tensor, features: Tensor) -> Tensor:
        return (missing * features).sum(0)

    def _times_gram(self, change: Tensor) -> Tensor:
        return change * self.gram

    def solve(self, ridge: float) -> Tensor:
        diagonal = self.gram + LEAST_DIAGONAL * self.gram.mean()
        return self.cross / (self.gram + ridge * diagonal)


def _factor(added: Tensor, output: Tensor) -> float:
    """What `output` is multiplied by before it is added to the stream: 1 but for Granite."""
    size = output.square().sum()
    factor = ((added * output).sum() / size).item() if size else 1.0
    return 1.0 if abs(factor - 1) < 0.02 else factor


def _gain_offset(norm: nn.Module, read: Tensor, output: Tensor) -> float | None:
    """0 if the norm multiplies by its weight, 1 if by one more; None if it does neither."""
    if getattr(norm, "bias", None) is not None or getattr(norm, "weight", None) is None:
        return None
    read, output = read.float(), output.float()
    plain = read * read.square().mean(-1, keepdim=True).rsqrt()
    for offset in (0.0, 1.0):
        difference = plain * (norm.weight.float() + offset) - output
        if difference.norm() < NORM_TOLERANCE * output.norm():
            return offset
    return None
