"""Costs that the config alone does not tell: memory under a load, and what sublayers take of the time of a token.

Time is fitted to measurements of the whole model and of a few pruned ones: time per token = base + the sum, over the
sublayers that are kept, of what one of their kind and shape takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

from finercut.model.costs import Cost, Costs, costs_of
from finercut.model.directory import ModelDirectory
from finercut.model.families import fixed_sublayers
from finercut.model.records import CostsReport, Fit, Group
from finercut.sublayers import KINDS, Sublayer, parse
from finercut.system.records import Spread

# More shapes than these are told apart by kind alone: each takes an engine of its own, and the residual tells.
MOST_GROUPS = 8


def costs_with(model: ModelDirectory, report: Path) -> Costs:
    """The costs of a whole model: what its config says, and what the stage `costs` added, if it has run.

    Raises:
        ValueError: the report is of another model, or cannot be read.
    """
    costs = costs_of(model)
    if not report.is_file():
        return costs
    added = CostsReport.read(report)
    if added.whole_sha256 is not None and added.whole_sha256 != model.weights_sha256:
        raise ValueError(f"{report} is of another model than {model}: run `finercut costs`")
    if added.memory_tokens is not None:
        costs["memory"] = memory(costs, model.config.dtype or torch.float32, added.memory_tokens)
    for name in ("time", "tpot"):
        if (fit := getattr(added, name)) is not None:
            costs[name] = table(fit, costs["sublayers"].by_sublayer)
    return costs


def memory(costs: Costs, dtype: torch.dtype, n_tokens: int) -> Cost:
    """GiB of the weights and of the KV cache of `n_tokens` tokens.

    An upper bound where attentions have a window: each token counts in all of them.
    """
    parameters, kv_cache = costs["parameters"], costs["kv_cache"]

    def gib(n_parameters: float, kv_bytes: float) -> float:
        return (n_parameters * dtype.itemsize + kv_bytes * n_tokens) / 2**30

    by_sublayer = {s: gib(n, kv_cache.by_sublayer[s]) for s, n in parameters.by_sublayer.items()}
    return Cost("GiB", by_sublayer, gib(parameters.whole, kv_cache.whole))


def table(fit: Fit, sublayers: Iterable[Sublayer]) -> Cost:
    """The fit as a cost; sublayers that are in no group take nothing of it."""
    ms = {parse(name).sublayers[0]: group.ms for group in fit.groups for name in group.sublayers}
    whole = fit.base_ms + sum(ms.values())
    return Cost("ms per output token", {s: ms.get(s, 0.0) for s in sublayers}, whole, fit.error)


def groups_of(model: ModelDirectory, costs: Costs) -> list[list[Sublayer]]:
    """The sublayers that may go, by kind and shape: parameters, KV cache, and what the config calls the block."""
    fixed, types = fixed_sublayers(model.config), getattr(model.language, "layer_types", None)
    free = [s for s in costs["parameters"].by_sublayer if s not in fixed]

    def shape(s: Sublayer) -> tuple[object, ...]:
        type_ = types[s.block] if types and s.kind == "attention" else ""
        return s.kind, type_, costs["parameters"].by_sublayer[s], costs["kv_cache"].by_sublayer[s]

    by_shape: dict[tuple[object, ...], list[Sublayer]] = {}
    for sublayer in free:
        by_shape.setdefault(shape(sublayer), []).append(sublayer)
    if len(by_shape) <= MOST_GROUPS:
        return list(by_shape.values())
    return [found for kind in KINDS if (found := [s for s in free if s.kind == kind])]


def removal_sets(groups: Sequence[Sequence[Sublayer]]) -> list[list[Sublayer]]:
    """What the pruned models to be timed lack: half of each group, and half of all; every second one, along the depth.

    An attention stays.
    """
    halves = [list(group[1::2] or group) for group in groups]
    sets = halves if len(halves) == 1 else [*halves, sorted(s for half in halves for s in half)]
    attentions = {s for group in groups for s in group if s.kind == "attention"}
    first = min(attentions, default=None)
    sets = [[s for s in removed if s != first or not attentions <= set(removed)] for removed in sets]
    return [removed for n, removed in enumerate(sets) if removed and removed not in sets[:n]]


def fitted(groups: Sequence[Sequence[Sublayer]], whole_ms: float, ratios: Mapping[tuple[Sublayer, ...], Spread]) -> Fit:
    """Least squares without negative times.

    Args:
        whole_ms: time per output token of the whole model.
        ratios: by what a pruned model lacks, its time over the whole model's.
    """
    kept = [[len(set(group) - set(removed)) for group in groups] for removed in [(), *ratios]]
    measured = np.array([whole_ms, *(whole_ms * ratio.median for ratio in ratios.values())])
    counts = np.array([[1, *row] for row in kept], dtype=float)
    found, _ = nnls(counts, measured)
    return Fit(
        base_ms=found[0],
        groups=[Group(sublayers=list(map(str, g)), ms=ms) for g, ms in zip(groups, found[1:], strict=True)],
        spread=max((ratio.half_width / ratio.median for ratio in ratios.values()), default=0.0),
        residual=float(np.max(np.abs(counts @ found / measured - 1))),
    )
