"""The step `prune`: removes the selected sublayers for good. Claim: equals the whole model with them masked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import finercut
from finercut.checkpoint.card import card, inherited
from finercut.checkpoint.lineage import entry
from finercut.checkpoint.parity import check_parity
from finercut.checkpoint.records import Claim, Predicted, PruneReport
from finercut.checkpoint.settings import Prune
from finercut.checkpoint.steps import Inputs, Proof
from finercut.checkpoint.writing import write_pruned
from finercut.model.costs import Costs, costs_of
from finercut.model.directory import ModelDirectory
from finercut.model.families import auto_class
from finercut.selection.selection import Selection, comes_to, given
from finercut.selection.settings import TARGETS, Budget
from finercut.selection.trajectory import Removal, Trajectory
from finercut.sublayers import Sublayer, parse
from finercut.system.staging import staged


def prune(
    model: ModelDirectory | Path | str,
    selection: Selection | Trajectory | Sequence[Sublayer | Removal | str],
    budget: Budget | None,
    directory: Path | str,
) -> PruneReport:
    """Write the checkpoint of a whole model less the selected sublayers.

    Args:
        selection: what a search found, or names of sublayers and blocks: 12.attention, 3.mlp, 7.block.
        budget: how much of the selection to take; None takes all of it.
        directory: replaced if it exists, once the new checkpoint is complete.

    Raises:
        FileNotFoundError: no whole model.
        ValueError: the selection belongs to another model, or does not reach the budget.
    """
    parent, chosen = ModelDirectory.of(model).written_by("fetch"), _selection(selection)
    with staged(Path(directory)) as partial:
        return _write(parent, chosen, budget, costs_of(parent), partial)


def apply(parent: ModelDirectory, directory: Path, settings: Prune, inputs: Inputs) -> PruneReport:
    """The step, for the pipeline; see `finercut.checkpoint.steps`."""
    return _write(parent, inputs.selection(), settings.budget, inputs.costs(parent), directory)


def claim(parent: ModelDirectory, child: ModelDirectory, proof: Proof) -> Claim:
    """
    Raises:
        ValueError: `child` was not pruned from `parent`.
        RuntimeError: logits that are not finite.
    """
    found = check_parity(parent, child, proof.held_out, proof.logit_tolerance, proof.device, proof.weights_gib)
    return Claim(
        name="prune",
        statement="computes what the whole model does with the same sublayers masked, with a KV cache and without",
        holds=found.passed,
        figures={
            "max_logit_difference": found.max_logit_difference,
            "max_logit_difference_cached": found.max_logit_difference_cached,
            "n_tokens": found.n_tokens,
        },
        limit=found.tolerance,
    )


def _selection(selection: Selection | Trajectory | Sequence[Sublayer | Removal | str]) -> Selection:
    if isinstance(selection, Selection):
        return selection
    if isinstance(selection, Trajectory):
        return selection.selection()
    names = [removal.sublayer if isinstance(removal, Removal) else str(removal) for removal in selection]
    for name in names:
        parse(name)
    return given(names)


def _write(
    parent: ModelDirectory, selection: Selection, budget: Budget | None, costs: Costs, directory: Path
) -> PruneReport:
    if not selection.removals:
        raise ValueError("nothing to remove: the selection is empty")
    _check_origin(parent, selection)
    taken = selection if budget is None else selection.within(budget, costs)
    removed = taken.sublayers
    there = costs["sublayers"]
    if unknown := [str(s) for s in removed if not there.by_sublayer.get(s)]:
        raise ValueError(
            f"cannot remove {', '.join(unknown)}: the model has {int(there.whole)} sublayers in "
            f"{parent.language.num_hidden_layers} blocks, and not these"
        )
    shares = costs.shares(removed)
    metadata = inherited(parent.path / "README.md")
    auto, n_sublayers = auto_class(parent.config).__name__, int(there.whole)
    text = card(taken, shares, n_sublayers, parent.weights_sha256, parent.trusted, auto, metadata)
    write_pruned(parent, removed, directory, _origin(parent, taken, budget), text)
    child = ModelDirectory(directory)
    last = taken.removals[-1]
    parameters, kv_cache = costs["parameters"], costs["kv_cache"]
    return PruneReport(
        method=taken.method,
        n_removals=len(taken.removals),
        removed=[str(s) for s in removed],
        n_removed_sublayers=len(removed),
        n_sublayers=n_sublayers,
        shares=shares,
        predicted=_predicted(costs, removed, budget),
        divergence=last.divergence,
        held_out_divergence=last.held_out_divergence,
        whole_parameters=int(parameters.whole),
        pruned_parameters=int(parameters.whole - parameters.of(removed)),
        whole_bytes=parent.weights_bytes,
        pruned_bytes=child.weights_bytes,
        whole_kv_bytes_per_token=int(kv_cache.whole),
        pruned_kv_bytes_per_token=int(kv_cache.whole - kv_cache.of(removed)),
        sha256=child.weights_sha256,
    )


def _predicted(costs: Costs, removed: Sequence[Sublayer], budget: Budget | None) -> dict[str, Predicted]:
    """In the units of a budget."""
    found = {}
    for unit, name in TARGETS.items():
        if (cost := costs.get(name)) is not None:
            value, error = comes_to(unit, cost, cost.of(removed)), cost.error or 0.0
            asked = budget.amount if budget is not None and budget.unit == unit else None
            found[unit] = Predicted(value=value, low=value * (1 - error), high=value * (1 + error), asked=asked)
    return found


def _check_origin(parent: ModelDirectory, selection: Selection) -> None:
    origin = selection.origin
    if origin is None:
        return
    if parent.weights_sha256 != origin.model_sha256:
        raise ValueError(
            f"the selection was made on weights {origin.model_sha256[:12]}, {parent} has "
            f"{parent.weights_sha256[:12]}: run `finercut search` again"
        )
    n_blocks = parent.language.num_hidden_layers
    if origin.n_blocks != n_blocks:
        raise ValueError(
            f"the selection is of a model of {origin.n_blocks} blocks, {parent} has {n_blocks}: run `finercut search` "
            "again"
        )


def _origin(parent: ModelDirectory, taken: Selection, budget: Budget | None) -> dict[str, Any]:
    """The `finercut` section of config.json."""
    settings = {"method": taken.method, "budget": budget and budget.model_dump(mode="json")}
    made = {
        "whole_sha256": parent.weights_sha256,
        "version": finercut.__version__,
        "lineage": [entry("prune", parent, settings).to_json()],
    }
    origin, last = taken.origin, taken.removals[-1]
    if origin is None:
        return made
    return {
        "source": origin.model_source,
        "revision": origin.model_revision,
        "calibration_sha256": origin.calibration_sha256,
        "divergence": {origin.divergence: last.divergence, "held_out": last.held_out_divergence},
        **made,
    }
