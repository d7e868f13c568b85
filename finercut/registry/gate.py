"""Whether a pruned model is good enough to be registered: its reports against the limits of `params.yaml`."""

from __future__ import annotations

import math

from finercut.checkpoint.records import ParityReport
from finercut.evaluation.records import EvaluateReport
from finercut.registry.evidence import Evaluation, Parity, Throughput
from finercut.registry.records import GateCheck
from finercut.serving.records import ThroughputReport


def check(
    parity: ParityReport | Parity,
    evaluate: EvaluateReport | Evaluation,
    throughput: ThroughputReport | Throughput,
    *,
    min_retention: float,
    min_speed_up: float,
    max_perplexity_ratio: float,
) -> list[GateCheck]:
    """Every check, passed or not. A figure that could not be computed (null, NaN) does not pass."""
    return [
        _at_most("parity", parity.max_logit_difference, parity.tolerance, holds=parity.passed),
        _at_most("parity_cached", parity.max_logit_difference_cached, parity.tolerance, holds=parity.passed),
        _at_least("mean_retention", evaluate.mean_retention, min_retention),
        _at_least("speed_up", throughput.speed_up, min_speed_up),
        _at_most("perplexity_ratio", evaluate.perplexity_ratio, max_perplexity_ratio),
    ]


def _at_least(name: str, value: float | None, limit: float) -> GateCheck:
    return _judged(name, value, limit, value is not None and value >= limit, "at least")


def _at_most(name: str, value: float, limit: float, holds: bool = True) -> GateCheck:
    return _judged(name, value, limit, holds and value <= limit, "at most")


def _judged(name: str, value: float | None, limit: float, passed: bool, bound: str) -> GateCheck:
    number = None if value is None or not math.isfinite(value) else value
    shown = "not a number" if number is None else f"{number:.4g}"
    reason = f"{name} is {shown}; {bound} {limit:.4g} is {'met' if passed else 'required'}"
    return GateCheck(name=name, value=number, limit=limit, passed=passed, reason=reason)
