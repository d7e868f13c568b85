"""The gate of registration: claims and measurements of a model against the limits of `params.yaml`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from finercut.checkpoint.records import Claim
from finercut.evaluation.records import Evaluation
from finercut.registry.records import Check
from finercut.serving.records import Speed


def check(
    claims: Sequence[Claim],
    evaluate: Evaluation,
    throughput: Speed,
    *,
    min_retention: float,
    min_speed_up: float,
    max_perplexity_ratio: float,
    allow_doubtful_whole: bool = False,
) -> list[Check]:
    """Every check, passed or not. Every claim must hold, and there must be one. A figure that is null or NaN fails.

    Nothing may speak against the whole model, unless that is allowed.
    """
    return [
        *(map(_claim, claims) if claims else [_nothing_claimed()]),
        _at_least("mean_retention", evaluate.mean_retention, min_retention),
        _at_least("speed_up", throughput.speed_up, min_speed_up),
        _at_most("perplexity_ratio", evaluate.perplexity_ratio, max_perplexity_ratio),
        *([] if allow_doubtful_whole else map(_doubted, evaluate.whole_doubts)),
    ]


def _doubted(doubt: str) -> Check:
    return Check(name="whole_model", value=None, passed=False, reason=f"the whole model may be broken: {doubt}")


def _claim(claim: Claim) -> Check:
    """Passed if the claim holds and, where it has a limit, its largest difference is within that, or its mean one."""
    differences = [value for name, value in claim.figures.items() if name.startswith(("max_", "mean_"))]
    largest = max(differences, default=0.0) if all(map(math.isfinite, differences)) else math.nan
    passed = claim.holds and not math.isnan(largest) and (claim.limit is None or largest <= claim.limit)
    shown = "not a number" if math.isnan(largest) else f"{largest:.4g}"
    bound = "" if claim.limit is None else f"; at most {claim.limit:.4g}"
    measured = f" ({shown}{bound})" if differences else ""
    return Check(
        name=f"claim.{claim.name}",
        value=largest if differences and not math.isnan(largest) else None,
        limit=claim.limit,
        passed=passed,
        reason=f"the claim of {claim.name}, {claim.statement}, {'holds' if passed else 'does not hold'}{measured}",
    )


def _nothing_claimed() -> Check:
    return Check(name="claims", value=0, limit=1, passed=False, reason="no claim was checked; at least 1 is required")


def _at_least(name: str, value: float | None, limit: float) -> Check:
    return _judged(name, value, limit, value is not None and value >= limit, "at least")


def _at_most(name: str, value: float, limit: float) -> Check:
    return _judged(name, value, limit, value <= limit, "at most")


def _judged(name: str, value: float | None, limit: float, passed: bool, bound: str) -> Check:
    number = None if value is None or not math.isfinite(value) else value
    shown = "not a number" if number is None else f"{number:.4g}"
    reason = f"{name} is {shown}; {bound} {limit:.4g} is {'met' if passed else 'required'}"
    return Check(name=name, value=number, limit=limit, passed=passed, reason=reason)
