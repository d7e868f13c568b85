"""The rule of promotion: when a challenger is at least as good as the champion. No I/O."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from finercut.evaluation.records import TaskFigures
from finercut.registry import gate
from finercut.registry.evidence import Evidence
from finercut.registry.records import Check
from finercut.system.records import Record

# Speed-ups compare only where all of these agree.
LOAD = (
    "input_tokens",
    "output_tokens",
    "concurrency",
    "request_rate",
    "n_requests",
    "n_warmups",
    "n_rounds",
    "dtype",
    "enforce_eager",
    "interleave",
    "kv_cache_gib",
    "max_model_len",
    "hardware",
    "engine",
    "torch_version",
)
# Scores compare only where these agree, perplexities where those of their own do.
SCORES = ("dtype", "lm_eval_version", "transformers_version", "seed")
PERPLEXITY = ("dtype", "transformers_version")
# What version 0.1 did not record, and params.yaml does not say.
_UNKNOWN_IN_0_1 = ("transformers_version",)
# Standard errors within which two retentions are no different.
N_SIGMA = 2


def gate_checks(challenger: Evidence, *, allow_limited: bool, **limits: float | bool) -> list[Check]:
    """The gate of registration again, with today's limits, and that nothing was evaluated in part.

    Args:
        limits: as `gate.check` takes them
    """
    checks = gate.check(challenger.claims, challenger.evaluate, challenger.throughput, **limits)
    return [*checks, _whole_tasks(challenger, allow_limited)]


def compare(
    challenger: Evidence,
    champion: Evidence,
    *,
    max_retention_drop: float,
    max_perplexity_rise: float,
    max_speed_up_drop: float,
) -> list[Check]:
    """The challenger against the champion: in no figure worse by more than its margin and the noise.

    Figures are relative to each one's own whole model, and compare only where they were measured alike. Retention is
    compared over the tasks that both were given in the same way; two models without such a task do not compare at all,
    and the challenger fails. Other figures that do not compare pass, for the gate's limits hold for them; the reason
    says what differs. A difference within the noise is none: two standard errors of the difference in mean retention,
    half the spread of both speed-ups over their rounds.

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
    return Check(name="limited_tasks", value=len(limited), passed=allow_limited or not limited, reason=reason)


def _retention(challenger: Evidence, champion: Evidence, margin: float) -> Check:
    theirs, ours = champion.evaluate.tasks, challenger.evaluate.tasks
    common = [name for name in ours if name in theirs and _same_way(ours[name], theirs[name])]
    if not common:
        reason = "no task was given to both in the same way: evaluate one that the champion was evaluated on"
        return Check(name="retention", value=None, passed=False, reason=reason)
    reached, best = (statistics.mean(tasks[name].retention for name in common) for tasks in (ours, theirs))
    if others := differing(challenger.evaluate, champion.evaluate, SCORES):
        return _not_compared("retention", reached, best, others)
    errors = [tasks[name].retention_stderr for tasks in (ours, theirs) for name in common]
    noise = N_SIGMA * math.hypot(*errors) / len(common)
    return _judged("retention", reached, best, best - margin, noise, f"over {len(common)} common tasks", at_least=True)


def _same_way(ours: TaskFigures, theirs: TaskFigures) -> bool:
    setting = [(t.metric, t.n_samples, t.n_fewshot) for t in (ours, theirs)]
    return setting[0] == setting[1] and ours.retention is not None and theirs.retention is not None


def _perplexity(challenger: Evidence, champion: Evidence, margin: float) -> Check:
    reached, best = challenger.evaluate.perplexity_ratio, champion.evaluate.perplexity_ratio
    others = differing(challenger.evaluate, champion.evaluate, PERPLEXITY)
    if challenger.calibrate.held_out_sha256 != champion.calibrate.held_out_sha256:
        others = ["held-out tokens", *others]
    if others:
        return _not_compared("perplexity_ratio", reached, best, others)
    return _judged("perplexity_ratio", reached, best, best * (1 + margin), 0, "on the same tokens", at_least=False)


def _speed_up(challenger: Evidence, champion: Evidence, margin: float) -> Check:
    ours, theirs = challenger.throughput, champion.throughput
    if others := differing(ours, theirs, LOAD):
        return _not_compared("speed_up", ours.speed_up, theirs.speed_up, others)
    spreads = (ours.speed_up_spread, theirs.speed_up_spread)
    noise = sum(spread.half_width for spread in spreads if spread is not None)
    best = theirs.speed_up
    return _judged("speed_up", ours.speed_up, best, best * (1 - margin), noise, "under the same load", at_least=True)


def differing(ours: Record, theirs: Record, names: Sequence[str]) -> list[str]:
    """Of these settings, those that differ; what only one of the two recorded differs, unless version 0.1 never did."""
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in names}
    return [
        name for name, pair in pairs.items() if pair[0] != pair[1] and not (None in pair and name in _UNKNOWN_IN_0_1)
    ]


def _not_compared(name: str, reached: float, best: float, others: Sequence[str]) -> Check:
    reason = f"{name} is not compared: measured with other {', '.join(others)}"
    return Check(name=name, value=reached, champion=best, passed=True, reason=reason)


def _judged(name: str, reached: float, best: float, limit: float, noise: float, how: str, *, at_least: bool) -> Check:
    allowed = limit - noise if at_least else limit + noise
    passed = reached >= allowed if at_least else reached <= allowed
    bound = "at least" if at_least else "at most"
    shown = f"{reached:.4g}" if math.isfinite(reached) else "not a number"
    within = f" within the noise of {noise:.2g}" if noise else ""
    reason = f"{name} is {shown} {how}; {bound} {limit:.4g}{within} is {'met' if passed else 'required'}"
    return Check(name=name, value=reached, limit=allowed, champion=best, passed=passed, reason=reason)
