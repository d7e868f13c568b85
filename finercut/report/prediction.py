"""What a budget in memory_gib, speed_up or tpot_ms was answered by: the prediction, beside what was measured."""

from __future__ import annotations

from finercut.checkpoint.records import PruneReport
from finercut.serving.records import ThroughputReport
from finercut.system.records import Spread

_NAMES = {"speed_up": "speed-up", "tpot_ms": "TPOT, ms"}


def confirmed(prune: PruneReport, throughput: ThroughputReport) -> list[str]:
    """A sentence for each unit that was predicted; none for other budgets.

    A prediction was off where the median of what was measured lies outside its bounds.
    """
    tpot = throughput.pruned.tpot_s
    measured = {
        "speed_up": throughput.speed_up_spread,
        "tpot_ms": Spread(median=1000 * tpot.median, low=1000 * tpot.low, high=1000 * tpot.high),
    }
    lines = []
    for unit, predicted in prune.predicted.items():
        asked = "" if predicted.asked is None else f" asked {predicted.asked:g},"
        if unit == "memory_gib":
            lines.append(f"weights and KV cache under the load, GiB:{asked} computed {predicted.value:.3g}")
        elif (found := measured[unit]) is not None:
            within = predicted.low <= found.median <= predicted.high
            lines.append(
                f"{_NAMES[unit]}:{asked} predicted {_bounds(predicted.value, predicted.low, predicted.high)}, measured "
                f"{_bounds(found.median, found.low, found.high)}: "
                + ("as predicted" if within else "THE PREDICTION WAS OFF by more than it stated")
            )
    return lines


def _bounds(value: float, low: float, high: float) -> str:
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"
