"""Several budgets of one model: what each point of the frontier came to, and which one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finercut.selection.settings import TARGETS
from finercut.system.records import Record, Spread
from finercut.system.staging import staged_file

Rule = Literal["leanest", "best"]
"""leanest: of the points that pass the gate, the one that saves most of the budget's cost; of time, the fastest. best:
the one that keeps most of the tasks' accuracy."""


class Point(Record):
    amount: float
    """Of the budget, in the report's unit."""
    removed: list[str]
    shares: dict[str, float]
    """What is saved of each cost, as a share of the whole model."""
    mean_retention: float | None
    mean_retention_stderr: float | None = None
    """With the tasks' errors independent."""
    perplexity_ratio: float
    speed_up: float
    speed_up_spread: Spread | None = None
    predicted_speed_up: float | None = None
    """Of the pruned model, where sublayers' times were measured beforehand."""
    passed: bool
    """The gate."""
    reasons: list[str]
    """Of the checks that failed, one sentence each."""
    sha256: str
    """Of the final checkpoint's weights."""
    run_id: str
    """In MLflow."""

    @property
    def measured_and_predicted(self) -> str:
        """The speed-up, for people."""
        spread, predicted = self.speed_up_spread, self.predicted_speed_up
        return (
            f"x {self.speed_up:.2f}"
            + (f" [{spread.low:.2f}, {spread.high:.2f}]" if spread else "")
            + (f", predicted {predicted:.2f}" if predicted is not None else "")
        )


class FrontierReport(Record):
    unit: str
    rule: Rule
    points: list[Point]
    """By amount."""
    chosen: float | None
    """The amount of the point that is registered; null where none passes."""


def containing(path: Path | None, sha256: str) -> FrontierReport | None:
    """The frontier that `path` records, if the final checkpoint with these weights is a point of it."""
    try:
        found = FrontierReport.read(path) if path else None
    except (OSError, ValueError):  # another version's, and nothing but the picture of it is lost
        return None
    return found if found and sha256 in {point.sha256 for point in found.points} else None


def choose(points: Sequence[Point], unit: str, rule: Rule) -> Point | None:
    """The point to register; of equal ones, the one that saves more."""
    passing = [point for point in points if point.passed]

    def saved(point: Point) -> float:
        # A cost that was predicted is confirmed by the speed-up.
        return point.shares.get(TARGETS.get(unit, unit), point.speed_up)

    if rule == "leanest":
        return max(passing, key=saved, default=None)
    return max(passing, key=lambda point: (point.mean_retention or 0.0, saved(point)), default=None)


def picture(report: FrontierReport, path: Path) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    draw(report, *figure.subplots(1, 2))
    title = "blue: passes the gate; red: does not; star: registered"
    if any(point.predicted_speed_up is not None for point in report.points):
        title += "; hollow: predicted"
    figure.suptitle(title, fontsize=9)
    with staged_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


def draw(report: FrontierReport, quality: Axes, speed: Axes) -> None:
    """What each point keeps and how fast it is, with error and spread, against what it saves of the parameters."""
    drawn = sorted(report.points, key=lambda point: point.shares["parameters"])
    saved = [0.0, *(100 * point.shares["parameters"] for point in drawn)]
    quality.plot(saved, [100.0, *(100 * (point.mean_retention or 0.0) for point in drawn)], "-", color="#7a7f87")
    speed.plot(saved, [1.0, *(point.speed_up for point in drawn)], "-", color="#7a7f87")
    for point in drawn:
        colour = "#2f6db5" if point.passed else "#c8452f"
        chosen = point.amount == report.chosen
        mark = {"color": colour, "marker": "*" if chosen else "o", "markersize": 14 if chosen else 7, "ls": ""}
        bar = {"ecolor": colour, "capsize": 3}
        x, spread = 100 * point.shares["parameters"], point.speed_up_spread
        error = 100 * (point.mean_retention_stderr or 0.0)
        quality.errorbar([x], [100 * (point.mean_retention or 0.0)], [error], **mark, **bar)
        around = [[point.speed_up - spread.low], [spread.high - point.speed_up]] if spread else None
        speed.errorbar([x], [point.speed_up], around, **mark, **bar)
        if point.predicted_speed_up is not None:
            speed.plot([x], [point.predicted_speed_up], "D", color="#7a7f87", markerfacecolor="none")
    quality.set(xlabel="parameters saved, %", ylabel="mean retention, %", ylim=(0, 105))
    speed.set(xlabel="parameters saved, %", ylabel="speed-up")
    for axes in (quality, speed):
        axes.grid(alpha=0.3)
