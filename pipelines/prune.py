"""Stage `prune`: the trajectory cut at the budget in, the pruned checkpoint and the removal map out."""

from __future__ import annotations

import logging

from finercut.checkpoint.prune import prune
from finercut.checkpoint.records import PruneReport
from finercut.report.pictures import removal_map
from finercut.selection.trajectory import read_trajectory
from pipelines import paths
from pipelines.params import Params

logger = logging.getLogger("finercut")


def run(params: Params) -> PruneReport:
    """
    Raises:
        FileNotFoundError: the model or the trajectory is missing.
        ValueError: they do not belong together, or the trajectory does not reach the budget.
    """
    found = read_trajectory(paths.TRAJECTORY)
    report = prune(paths.MODEL, found, params.prune.budget, paths.PRUNED)
    title = f"{found.provenance.model_source}: {report.n_removed_sublayers} of {report.n_sublayers} sublayers removed"
    removal_map(found.first(report.n_removals), paths.REMOVALS_PICTURE, title)
    shares = report.shares
    logger.info(
        "prune: removed %.1f %% of sublayers, %.1f %% of parameters, %.1f %% of KV cache; %.0f -> %.0f MiB",
        100 * shares.sublayers,
        100 * shares.parameters,
        100 * shares.kv_cache,
        report.whole_bytes / 2**20,
        report.pruned_bytes / 2**20,
    )
    report.write(paths.report("prune"))
    return report
