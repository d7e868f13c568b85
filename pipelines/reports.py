"""The report of each stage: its type, and whether a cached one can still be read."""

from __future__ import annotations

from finercut.checkpoint.records import HealReport, ProveReport, PruneReport, QuantiseReport
from finercut.evaluation.records import EvaluateReport, Measured
from finercut.model.records import CostsReport
from finercut.selection.records import SearchReport
from finercut.serving.records import ThroughputReport
from finercut.sources.records import CalibrateReport, FetchReport
from finercut.system.records import Record

from . import paths

KINDS: dict[str, type[Record]] = {
    "fetch": FetchReport,
    "calibrate": CalibrateReport,
    "prove_whole": ProveReport,
    "evaluate_whole": Measured,
    "costs": CostsReport,
    "search": SearchReport,
    "prune": PruneReport,
    "heal": HealReport,
    "quantise": QuantiseReport,
    "prove": ProveReport,
    "evaluate": EvaluateReport,
    "throughput": ThroughputReport,
}


def unreadable(stage: str) -> str | None:
    """Why this version cannot read the report of a stage that another version wrote; None if it can, or there is none.

    Such a stage is reproduced again: what it computed may be right, but what it says of it lacks something.
    """
    path = paths.report(stage)
    if stage not in KINDS or not path.is_file():
        return None
    try:
        KINDS[stage].read(path)
    except ValueError as error:
        return str(error)
    return None
