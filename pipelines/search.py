"""Stage `search`: the model and the calibration set in, the trajectory and its curves out."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import tempfile
import time
from pathlib import Path

from finercut.registry import live
from finercut.report.pictures import divergence_curves
from finercut.selection import distributed, trajectory
from finercut.selection.records import SearchReport
from finercut.selection.settings import Budget, Search
from finercut.selection.trajectory import Removal, Step, Trajectory
from finercut.system.staging import staged_file

from . import paths
from .params import Params
from .search_job import inputs, prepared
from .search_methods import Selected, selected

logger = logging.getLogger("finercut")

# Held-out divergence this many times the calibration's: the removals fit the calibration set, not the model's use.
PART_RATIO = 1.5


def run(params: Params) -> SearchReport | None:
    """Select by `search.method`, continuing where an interrupted search of the same provenance stopped.

    With `n_processes`, in that many processes; started by torchrun, as one of its processes.

    Returns:
        The report; None in all processes of torchrun's but the first, which alone writes files and logs.

    Raises:
        FileNotFoundError: the model or the calibration set is missing.
        ValueError: more is to be removed than there is.
        RuntimeError: another process of the search has ended.
    """
    n_processes = params.search.n_processes
    if n_processes > 1 and not distributed.started():
        inputs(params.search, params.prune.budget)  # report bad input once, not from every process
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "params.yaml"
            file.write_text(params.model_dump_json(by_alias=True), encoding="utf-8")
            distributed.start(n_processes, ["-m", f"{__package__}.cli", "search", "--params", str(file)])
        return SearchReport.read(paths.report("search"))
    with distributed.ranks() as ranks:
        return _search(params.search, params.prune.budget, ranks)


def is_stale(params: Params) -> bool:
    """Whether the task's examples were edited after the search: DVC knows their path alone."""
    path = paths.report("search")
    if params.search.task is None or not path.is_file() or not Path(params.search.task).is_file():
        return False
    recorded = json.loads(path.read_text(encoding="utf-8")).get("task_file_sha256")
    return recorded != _file_sha256(params.search.task)


def _search(settings: Search, budget: Budget, ranks: distributed.Ranks) -> SearchReport | None:
    job = prepared(settings, budget, ranks)
    found = selected(job)
    if not ranks.first:
        return None
    live.finish()
    finished = Trajectory(job.provenance, found.steps)
    # Remove the stale report first, so that a crash cannot leave it beside the new trajectory.
    paths.report("search").unlink(missing_ok=True)
    trajectory.write(paths.TRAJECTORY, finished)
    selection = finished.selection()
    if found.stopped is not None:
        logger.warning("search: ended after %d removals: the next one's %s", len(found.steps), found.stopped)
        selection = selection.model_copy(update={"left": []})
    selection.write(paths.SELECTION)
    _write_curve(finished)
    divergence_curves(finished, paths.CURVE_PICTURE)
    report = _report(finished, settings, job.goal.n_candidates, found, time.monotonic() - job.started)
    if report.curves_part:
        logger.warning(
            "search: divergence on held-out tokens%s is %.2f times the calibration's: the removals fit the calibration "
            "set; make it larger or broader",
            *_worst(finished.removals[-1]),
        )
    report.write(paths.report("search"))
    return report


def _write_curve(finished: Trajectory) -> None:
    with staged_file(paths.CURVE) as partial, partial.open("w", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", "sublayer", "divergence", "held_out_divergence"])
        table.writerows([r.step, r.sublayer, r.divergence, r.held_out_divergence] for r in finished.removals)


def _worst(last: Step) -> tuple[str, float]:
    """The source with the highest held-out divergence, for people, and that over the calibration's."""
    by_source = {f" of {name}": value for name, value in last.held_out_by_source.items()}
    where, held_out = max((by_source or {"": last.held_out_divergence}).items(), key=lambda found: found[1])
    if not held_out:
        return where, 0.0
    return where, held_out / last.divergence if last.divergence else math.inf


def _report(finished: Trajectory, settings: Search, n_candidates: int, found: Selected, seconds: float) -> SearchReport:
    last = finished.removals[-1]
    margins = [r.margin for r in found.removals if r.margin is not None]
    return SearchReport(
        method=finished.provenance.name,
        nested=finished.provenance.nested,
        n_swaps=found.n_swaps,
        n_generations=found.n_generations,
        task_file_sha256=None if settings.task is None else _file_sha256(settings.task),
        stopped=found.stopped,
        controls=last.controls,
        final_refitted=last.refitted if isinstance(last, Removal) else None,
        mode=settings.mode,
        least_margin=min(margins, default=None),
        largest_fall=max((r.largest_fall for r in found.removals), default=0.0),
        error_probability=sum(r.error_probability for r in found.removals),
        divergence=settings.divergence,
        n_candidates=n_candidates,
        n_removals=len(finished.removals),
        removals=[r.sublayer for r in finished.removals],
        final_divergence=last.divergence,
        final_held_out_divergence=last.held_out_divergence,
        final_held_out_by_source=last.held_out_by_source,
        curves_part=_worst(last)[1] > PART_RATIO,
        evaluations=sum(r.evaluations for r in found.removals),
        sublayer_passes=sum(r.sublayer_passes for r in found.removals),
        brute_force_sublayer_passes=sum(r.brute_force_sublayer_passes for r in found.removals),
        resumed_after=found.resumed_after,
        seconds=seconds,
    )


def _file_sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
