"""The rule of promotion: what makes a challenger at least as good as the champion. No I/O."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from finercut.registry import gate
from finercut.registry.evidence import Evidence, TaskResult

# Figures compare only where these agree.
_LOAD = ("input_tokens", "output_tokens", "concurrency", "dtype", "enforce_eager", "hardware")


@dataclass(frozen=True)
class Check:
    """One line of the comparison."""

    name: str
    challenger: float | None
    champion: float | None
    passed: bool
    reason: str
    """One sentence."""


def gate_checks(challenger: Evidence, *, allow_limited: bool, **limits: float) -> list[Check]:
    """The gate of registration once more, with the limits of today, and that nothing was evaluated in part.

    Args:
        limits: as `gate.check` takes them
    """
    checks = gate.check(challenger.parity, challenger.evaluate, challenger.throughput, **limits)
    again = [Check(c.name, c.value, None, c.passed, c.reason) for c in checks]
    return [*again, _whole_tasks(challenger, allow_limited)]


def compare(
    challenger: Evidence,
    champion: Evidence,
    *,
    max_retention_drop: float,
    max_perplexity_rise: float,
    max_speed_up_drop: float,
) -> list[Check]:
    """The challenger against the champion: in no figure worse by more than its margin.

    Figures are relative to each one's own whole model. Retention is compared over the tasks both were given in the same
    way, and there must be one; perplexity and speed-up only where held-out tokens and load were the same.

    Args:
        max_retention_drop: of the mean retention, in absolute terms
        max_perplexity_rise, max_speed_up_drop: as a share of the champion's
    """
    return [
        _retention(challenger, champion, max_retention_drop),
        _perplexity(challenger, champion, max_perplexity_rise),
        _speed_up(challenger, champion, max_speed_up_drop),
    ]


def _whole_tasks(challenger: Evidence, allow_limited: bool) -> Check:
    limited = [
        f"{name} ({task.n_samples} of {task.n_available})"
        for name, task in challenger.evaluate.tasks.items()
        if task.n_samples < task.n_available
    ]
    if not limited:
        reason = "every task was evaluated on all its documents"
    else:
        allowed = "which promote.allow_limited allows" if allow_limited else "promote.allow_limited is false"
        reason = f"evaluated in part: {', '.join(limited)}; {allowed}"
    return Check("limited_tasks", len(limited), None, allow_limited or not limited, reason)


def _retention(challenger: Evidence, champion: Evidence, margin: float) -> Check:
    theirs, ours = champion.evaluate.tasks, challenger.evaluate.tasks
    common = [name for name in ours if name in theirs and _same_way(ours[name], theirs[name])]
    if not common:
        reason = "no task was given to both in the same way: evaluate one that the champion was evaluated on"
        return Check("retention", None, None, False, reason)
    reached, best = (statistics.mean(tasks[name].retention for name in common) for tasks in (ours, theirs))
    return _judged("retention", reached, best, best - margin, f"over {len(common)} common tasks", at_least=True)


def _same_way(ours: TaskResult, theirs: TaskResult) -> bool:
    setting = [(t.metric, t.n_samples, t.n_fewshot) for t in (ours, theirs)]
    return setting[0] == setting[1] and ours.retention is not None and theirs.retention is not None


def _perplexity(challenger: Evidence, champion: Evidence, margin: float) -> Check:
    reached, best = challenger.evaluate.perplexity_ratio, champion.evaluate.perplexity_ratio
    if challenger.calibrate.held_out_sha256 != champion.calibrate.held_out_sha256:
        return _not_compared("perplexity_ratio", reached, best, ["held-out tokens"])
    return _judged("perplexity_ratio", reached, best, best * (1 + margin), "on the same tokens", at_least=False)


def _speed_up(challenger: Evidence, champion: Evidence, margin: float) -> Check:
    ours, theirs = challenger.throughput, champion.throughput
    others = [name for name in _LOAD if getattr(ours, name) != getattr(theirs, name)]
    if others:
        return _not_compared("speed_up", ours.speed_up, theirs.speed_up, others)
    best = theirs.speed_up
    return _judged("speed_up", ours.speed_up, best, best * (1 - margin), "under the same load", at_least=True)


def _not_compared(name: str, reached: float, best: float, others: Sequence[str]) -> Check:
    return Check(name, reached, best, True, f"{name} is not compared: measured with other {', '.join(others)}")


def _judged(name: str, reached: float, best: float, limit: float, how: str, *, at_least: bool) -> Check:
    passed = reached >= limit if at_least else reached <= limit
    bound = "at least" if at_least else "at most"
    shown = f"{reached:.4g}" if math.isfinite(reached) else "not a number"
    reason = f"{name} is {shown} {how}; {bound} {limit:.4g} is {'met' if passed else 'required'}"
    return Check(name, reached, best, passed, reason)
