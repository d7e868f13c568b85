"""Healing in closed form: fits what kept sublayers write to the residual stream, in order of depth.

The whole model's stream and the pruned one's go through the blocks side by side. At a kept sublayer, the target is the
whole model's stream just before the next kept one: it contains the removed sublayers in between, and its difference
from the pruned model's own stream contains the drift of everything before. The sublayer's output projection W, which
writes W a to the stream, becomes W + dW with

    dW = R A' (A A' + ridge D)^-1

where the columns of A are the projection's inputs, those of R what is missing in the stream, a column a token, and D is
the diagonal of A A': a ridge towards the present weights. Where a norm follows the projection (Gemma, OLMo 2), its gain
is fitted instead, each channel for itself. A token counts by the inverse square of its target's norm, because the next
sublayer's norm divides by about that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finercut.healing.fidelity import fidelity, logits_of
from finercut.healing.settings import Refit
from finercut.healing.task import Healed, Task, one_device
from finercut.model.devices import dtype_of
from finercut.model.directory import quiet
from finercut.model.families import Layout, layout_of
from finercut.model.loading import load_pruned, load_whole
from finercut.selection.blocks import Blocks, Unit
from finercut.sublayers import Sublayer

logger = logging.getLogger("finercut")

# Of the windows, the share that chooses the ridge; the fit that is kept sees all of them.
CHOOSING_SHARE = 0.25
# A fit that explains less of what is missing, on windows it did not see, is not taken.
LEAST_GAIN = 0.01
# A token counts at most this many times as much as the median token.
MOST_WEIGHT = 10.0
# Added to D as a share of its mean, for inputs that are always zero.
LEAST_DIAGONAL = 1e-4
# Largest relative difference between a norm's output and what its weight says.
NORM_TOLERANCE = 0.05
# Fewer tokens than this many times a projection's inputs are warned of.
TOKENS_PER_INPUT = 4


def heal(task: Task, settings: Refit) -> Healed:
    """
    Raises:
        ValueError: sublayers that run in parallel, a single window, or a device that is not here.
        RuntimeError: values that are not finite.
    """
    device = one_device(settings.device)
    dtype = dtype_of(settings.dtype, device)
    with quiet():
        model = load_whole(task.whole, dtype, device)
        kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        fitted = fit(model, task.windows.to(device), task.pruned.removed, settings, _stored(task), task.on_metrics)
        for name in fitted:
            model.get_parameter(name).data = kept[name]
        found = _best_fraction(task, model, load_pruned(task.pruned, dtype, device), fitted, settings.fractions)
    return Healed(found, task.windows.numel() if found else 0)


def fit(
    model: PreTrainedModel,
    windows: Tensor,
    removed: Iterable[Sublayer],
    settings: Refit,
    stored: Callable[[str], Tensor | None] = lambda name: None,
    on_metrics: Callable[[dict[str, float], int], None] = lambda figures, step: None,
) -> dict[str, Tensor]:
    """Fit the kept sublayers of the whole `model` from the first gap on, and set its parameters to what was found.

    Args:
        windows: token ids, (samples, tokens), on the model's device.
        stored: a parameter as the checkpoint stores it, by name: new values are rounded to its dtype before the next
            sublayer is fitted. None: as in the model.

    Returns:
        New values by parameter name, in the dtype they are stored in.

    Raises:
        ValueError: sublayers that run in parallel, or a single window.
        RuntimeError: values that are not finite.
    """
    layout, gone = layout_of(model.config), frozenset(removed)
    if not layout.sequential:
        raise ValueError(
            f"heal.method: refit cannot fit a {model.config.model_type} model, whose blocks are not an attention "
            "followed by an MLP: take distill"
        )
    if len(windows) < 2:
        raise ValueError("heal.method: refit needs two windows at least: one to choose the ridge by")
    return _Fit(model, layout, windows, gone, settings, stored, on_metrics).run()


class _Fit:
    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        windows: Tensor,
        removed: frozenset[Sublayer],
        settings: Refit,
        stored: Callable[[str], Tensor | None],
        on_metrics: Callable[[dict[str, float], int], None],
    ) -> None:
        self.layout = layout
        self.removed = removed
        self.settings = settings
        self.stored = stored
        self.on_metrics = on_metrics
        self.blocks = Blocks(model, layout, windows[:1])
        self.names = {id(module): name for name, module in model.named_modules()}
        n_choosing = max(1, round(CHOOSING_SHARE * len(windows)))
        n_at_once = max(1, settings.batch_tokens // windows.shape[1])
        parts = windows[n_choosing:].split(n_at_once), windows[:n_choosing].split(n_at_once)
        self.batches = [*parts[0], *parts[1]]
        self.n_fitting = len(parts[0])
        """Batches before this one are fitted to; the others choose the ridge."""

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        whole = pruned = [self.blocks.embed(batch) for batch in self.batches]
        fitted: dict[str, Tensor] = {}
        units = self.blocks.units
        differ, position = False, 0
        with tqdm(desc="heal", unit="sublayer", total=len(units), disable=None) as bar:
            while position < len(units):
                unit, after = units[position], position + 1
                kept = self.removed.isdisjoint(unit.sublayers)
                while after < len(units) and not self.removed.isdisjoint(units[after].sublayers):
                    after += 1
                for other in units[position:after]:
                    whole = [self.blocks.run(other, states, ()) for states in whole]
                differ |= not kept or after > position + 1
                if not differ:
                    pruned = whole
                elif kept:
                    fitted |= self._fit(unit, pruned, whole)
                    pruned = [self.blocks.run(unit, states, ()) for states in pruned]
                bar.update(after - position)
                position = after
        return fitted

    def _fit(self, unit: Unit, before: list[Tensor], targets: list[Tensor]) -> dict[str, Tensor]:
        """Set what the unit writes with to what makes `before` come closest to `targets`."""
        (sublayer,) = unit.sublayers
        written = self._written(unit, before[0])
        if written is None:
            logger.info("heal: %s is left as it is: what it writes is not one projection's output", sublayer)
            return {}
        weights = _weights(targets)
        seen, unseen = written.moments(), written.moments()
        for index, (states, target, weight) in enumerate(zip(before, targets, weights, strict=True)):
            features, after = self._run(written, unit, states)
            missing = (target.float() - after.float()).flatten(0, 1)
            (seen if index < self.n_fitting else unseen).add(features, missing, weight.flatten())
        best = max(self.settings.ridges, key=lambda ridge: unseen.explained(seen.solve(ridge)))
        explained = unseen.explained(seen.solve(best))
        if explained != explained:
            raise RuntimeError(f"refit: the stream at {sublayer} is not finite")
        self.on_metrics({"heal.explained": explained}, 2 * unit.block + (sublayer.kind == "mlp"))
        if explained < LEAST_GAIN:
            logger.info("heal: %s is left as it is: the fit explains %.1f %%", sublayer, 100 * explained)
            return {}
        seen.merge(unseen)
        own = self.stored(written.name)
        value = written.parameter.detach().clone() if own is None else own.to(written.parameter.device)
        new = written.changed(value.float(), seen.solve(best).float()).to(value.dtype)
        written.parameter.data = new.to(written.parameter.dtype)
        logger.info("heal: %s, ridge %g, explains %.1f %% of what is missing", sublayer, best, 100 * explained)
        return {written.name: new.cpu()}

    def _run(self, written: _Written, unit: Unit, states: Tensor) -> tuple[Tensor, Tensor]:
        """The features (tokens, features), float32, and the stream after the unit."""
        caught: list[Tensor] = []
        hook = written.module.register_forward_hook(lambda _, *call: caught.append(written.feature(*call)))
        try:
            after = self.blocks.run(unit, states, ())
        finally:
            hook.remove()
        return written.factor * caught[-1].flatten(0, -2).float(), after

    def _written(self, unit: Unit, states: Tensor) -> _Written | None:
        """What the unit's output is linear in; None if there is nothing of that kind."""
        (kind,) = unit.kinds
        branch = self.layout.branch(kind, unit.block)
        block = self.blocks.blocks[unit.block]
        if branch.beside:
            return None
        core = getattr(block, branch.core)
        last = getattr(block, branch.after[-1]) if branch.after else None
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            calls.append((module, args[0] if args else output, output))

        projections = [m for m in core.modules() if isinstance(m, (nn.Linear, Conv1D))]
        watched = {id(m): m for m in [*projections, core, *([] if last is None else [last])]}
        hooks = [module.register_forward_hook(keep) for module in watched.values()]
        try:
            after = self.blocks.run(unit, states, ())
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
        n_tokens = sum(batch.numel() for batch in self.batches)
        if n_tokens < TOKENS_PER_INPUT * n_inputs:
            logger.warning("heal: %s.%s has %d inputs, and there are %d tokens", unit.block, kind, n_inputs, n_tokens)
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


def _weights(targets: list[Tensor]) -> list[Tensor]:
    """Of each token; (samples, tokens) a batch. The first position holds no text in some models, and the largest
    values of the stream in most."""
    weights = [1 / target.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny) for target in targets]
    most = MOST_WEIGHT * torch.cat([w[:, 1:].flatten() for w in weights]).median()
    for weight in weights:
        weight.clamp_(max=most.item())
        weight[:, 0] = 0
    return weights


def _factor(added: Tensor, output: Tensor) -> float:
    """What `output` is multiplied by before it is added to the stream: 1 but for Granite."""
    factor = ((added * output).sum() / output.square().sum()).item()
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


def _stored(task: Task) -> Callable[[str], Tensor | None]:
    return lambda name: task.pruned.tensor(name) if name in task.pruned.tensors else None


def _best_fraction(
    task: Task, whole: PreTrainedModel, pruned: PreTrainedModel, fitted: dict[str, Tensor], fractions: Sequence[float]
) -> dict[str, Tensor]:
    """The fitted values, or values on the way to them, whichever diverge least on held-out tokens; empty if none
    diverge less than the pruned model."""
    held_out = task.held_out.to(whole.device)
    own = {name: pruned.get_parameter(name).detach().cpu() for name in fitted}
    own |= {name: value for name in fitted if (value := _stored(task)(name)) is not None}
    least, best = fidelity(logits_of(whole), logits_of(pruned), held_out).divergence, {}
    logger.info("heal: before, held-out divergence %.4f", least)
    for fraction in fractions if fitted else ():
        values = {n: own[n].lerp(new.to(own[n].dtype), fraction) if fraction < 1 else new for n, new in fitted.items()}
        for name, value in values.items():
            parameter = pruned.get_parameter(name)
            parameter.data = value.to(parameter)
        found = fidelity(logits_of(whole), logits_of(pruned), held_out)
        logger.info(
            "heal: %g of the change, held-out divergence %.4f, perplexity %.2f",
            fraction,
            found.divergence,
            found.perplexity,
        )
        if found.divergence < least:
            least, best = found.divergence, values
    return best
