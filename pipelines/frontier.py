"""Compresses the model to several budgets and registers one of them.

The largest budget comes first: a greedy search that does not fill it answers the smaller ones. What does not depend on
the budget is measured once, and points that DVC's cache has are not computed again, so an interrupted frontier goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from pydantic import JsonValue

from finercut.checkpoint.records import ProveReport, PruneReport
from finercut.evaluation.records import EvaluateReport
from finercut.registry import runs
from finercut.registry.records import Check, RegisterReport
from finercut.report.frontier import FrontierReport, Point, Rule, choose, picture
from finercut.selection.settings import SMALLER_IS_MORE
from finercut.serving.records import ThroughputReport

from . import paths, register, settings, summary
from .params import Params, load

logger = logging.getLogger("finercut")

Execute = Callable[..., tuple[RegisterReport | None, list[Check], str]]
"""Runs every stage with these params as an MLflow run of its own, with tags, and registers the result or not; the last
argument, where given, are the params of later runs. Returns the registration, the gate's checks and the run's id."""

Ending = Callable[[Params, runs.Run], AbstractContextManager[None]]


def run(
    budgets: Sequence[float],
    unit: str | None,
    rule: Rule,
    params_file: str | None,
    overrides: Mapping[str, JsonValue],
    name: Callable[[str], None],
    execute: Execute,
    ending: Ending,
) -> RegisterReport:
    """One parent run in MLflow with a child for each point; reports/frontier.json and .png.

    params.yaml has the chosen budget afterwards; what it had before, where nothing is chosen.

    Args:
        unit: of the budgets; None: that of `prune.budget` in params.yaml.
        name: gives the flow run its title.
        ending: surrounds all of it, once the parent run is open, however it ends.

    Raises:
        ValueError: a budget that is not allowed, or is given twice.
        RuntimeError: a stage failed.
        register.Refused: no point passes the gate.
    """
    params = load()
    unit = unit or params.prune.budget.unit
    budgets = settings.budget_amounts(budgets, unit)
    before = paths.PARAMS.read_text(encoding="utf-8")

    def take(amount: float) -> None:
        changes = {"prune.budget.unit": unit, "prune.budget.amount": amount}
        if params_file:
            settings.take_committed(params_file, {**overrides, **changes})
        else:
            settings.change(before, changes)

    with _restored_on_error(before):
        planned = []
        for amount in sorted(budgets, reverse=unit not in SMALLER_IS_MORE):  # all are allowed, before the first is run
            take(amount)
            planned.append((amount, load()))
        amounts = ", ".join(map(str, budgets))
        title = f"{params.model}: frontier of {unit}, {amounts}"
        name(title)
        parent = register.open_run(params, {"frontier": amounts}, "finercut frontier", title)
    with runs.recorded(parent), ending(params, parent):
        tags = {"mlflow.parentRunId": parent.run_id}
        with _restored_on_error(before):
            points = []
            unasked = [later for _, later in planned[1:]]
            for amount, point in planned:
                take(amount)
                _, checks, run_id = execute(point, tags | {"frontier.amount": str(amount)}, False, unasked)
                unasked = []  # the first run asks about all budgets
                points.append(_point(amount, checks, run_id))
                logger.info("frontier: %s", _line(points[-1], unit))
            points.sort(key=lambda point: point.amount)
            chosen = choose(points, unit, rule)
            report = FrontierReport(unit=unit, rule=rule, points=points, chosen=chosen and chosen.amount)
            report.write(paths.report("frontier"))
            picture(report, paths.FRONTIER_PICTURE)
            parent.log_reports([paths.report("frontier"), paths.FRONTIER_PICTURE])
            parent.describe(markdown())
            if chosen is None:
                raise register.Refused(
                    f"no point of the frontier passes the gate: {'; '.join(_line(point, unit) for point in points)}"
                )
            (amount,) = settings.budget_amounts([chosen.amount], unit)
            take(amount)
        tags |= {"frontier.amount": str(amount), "frontier.rule": rule}
        registered, _, _ = execute(load(), tags, True)
        return registered


@contextmanager
def _restored_on_error(before: str) -> Iterator[None]:
    """Gives params.yaml back its text where the block fails."""
    try:
        yield
    except BaseException:
        settings.replace(before)
        raise


def _point(amount: float, checks: Sequence[Check], run_id: str) -> Point:
    prune = PruneReport.read(paths.report("prune"))
    evaluate = EvaluateReport.read(paths.report("evaluate"))
    throughput = ThroughputReport.read(paths.report("throughput"))
    return Point(
        amount=amount,
        removed=prune.removed,
        shares=prune.shares,
        mean_retention=evaluate.mean_retention,
        mean_retention_stderr=evaluate.mean_retention_stderr,
        perplexity_ratio=evaluate.perplexity_ratio,
        speed_up=throughput.speed_up,
        speed_up_spread=throughput.speed_up_spread,
        predicted_speed_up=prune.predicted["speed_up"].value if "speed_up" in prune.predicted else None,
        passed=all(check.passed for check in checks),
        reasons=[check.reason for check in checks if not check.passed],
        sha256=ProveReport.read(paths.report("prove")).sha256,
        run_id=run_id,
    )


def _line(point: Point, unit: str) -> str:
    outcome = "passes" if point.passed else f"does not pass ({'; '.join(point.reasons)})"
    return f"{point.amount:g} {unit}, speed-up {point.speed_up:.2f}, {outcome}"


def markdown() -> str:
    """The table of the last frontier."""
    report = FrontierReport.read(paths.report("frontier"))
    rows = [
        [
            f"{point.amount:g}{' *' if point.amount == report.chosen else ''}",
            *(f"-{100 * share:.1f} %" for share in point.shares.values()),
            point.measured_and_predicted,
            "-" if point.mean_retention is None else f"{100 * point.mean_retention:.1f} %",
            f"{point.perplexity_ratio:.2f}",
            "passed" if point.passed else "; ".join(point.reasons),
        ]
        for point in report.points
    ]
    costs = list(report.points[0].shares)
    header = [f"budget, {report.unit}", *costs, "tokens/s", "retention", "perplexity ratio", "gate"]
    return summary.table(header, rows)
