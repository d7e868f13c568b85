"""Stage `prune`: the selection, cut at the budget, in; the pruned checkpoint and the removal map out."""

from __future__ import annotations

import logging
from functools import partial

from finercut.checkpoint.records import PruneReport
from finercut.model.fitted_costs import costs_with
from finercut.report.pictures import removal_map

from . import paths, steps
from .params import Params

logger = logging.getLogger("finercut")


def run(params: Params) -> PruneReport:
    """
    Raises:
        FileNotFoundError: the model or the selection is missing.
        ValueError: they do not belong together, or the selection does not reach the budget.
    """
    costs = partial(costs_with, report=paths.report("costs"))
    report: PruneReport = steps.run("prune", params, costs=costs)
    selection = steps.read_selection().first(report.n_removals)
    source = selection.origin.model_source if selection.origin else paths.MODEL
    title = f"{source}: {report.n_removed_sublayers} of {report.n_sublayers} sublayers removed"
    n_blocks = steps.parent_of("prune").language.num_hidden_layers
    removal_map(selection, n_blocks, paths.REMOVALS_PICTURE, title)
    logger.info(
        "prune: removed %s; %.0f -> %.0f MiB",
        ", ".join(f"{share:.1%} of {cost}" for cost, share in report.shares.items()),
        report.whole_bytes / 2**20,
        report.pruned_bytes / 2**20,
    )
    report.write(paths.report("prune"))
    return report
