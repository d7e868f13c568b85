"""What may be registered."""

import math

import example_reports
import pytest

from finercut.registry import gate

LIMITS = {"min_retention": 0.75, "min_speed_up": 1.25, "max_perplexity_ratio": 1.5}


def judged(parity=None, evaluate=None, throughput=None):
    checks = gate.check(
        example_reports.parity(**parity or {}),
        example_reports.evaluate(**evaluate or {}),
        example_reports.throughput(**throughput or {}),
        **LIMITS,
    )
    return {c.name: c for c in checks}


def test_a_model_exactly_at_every_limit_passes():
    checks = judged(parity={"max_logit_difference": 0.001})
    assert [(c.value, c.limit, c.passed) for c in checks.values()] == [
        (0.001, 0.001, True),
        (0.00025, 0.001, True),
        (0.75, 0.75, True),
        (1.25, 1.25, True),
        (1.5, 1.5, True),
    ]


@pytest.mark.parametrize(
    ("reports", "name", "reason"),
    [
        (
            {"evaluate": {"mean_retention": 0.7499}},
            "mean_retention",
            "mean_retention is 0.7499; at least 0.75 is required",
        ),
        ({"throughput": {"speed_up": 1.24}}, "speed_up", "speed_up is 1.24; at least 1.25 is required"),
        (
            {"evaluate": {"perplexity_ratio": 1.51}},
            "perplexity_ratio",
            "perplexity_ratio is 1.51; at most 1.5 is required",
        ),
        ({"parity": {"max_logit_difference": 0.01}}, "parity", "parity is 0.01; at most 0.001 is required"),
        (
            {"parity": {"max_logit_difference_cached": 0.01}},
            "parity_cached",
            "parity_cached is 0.01; at most 0.001 is required",
        ),
    ],
)
def test_each_limit_refuses_alone_and_says_why(reports, name, reason):
    checks = judged(**reports)
    assert [c.name for c in checks.values() if not c.passed] == [name]
    assert checks[name].reason == reason


def test_a_parity_check_that_failed_is_not_excused_by_its_figures():
    checks = judged(parity={"passed": False})
    assert not checks["parity"].passed
    assert not checks["parity_cached"].passed


@pytest.mark.parametrize(
    ("reports", "name"),
    [
        ({"evaluate": {"mean_retention": None}}, "mean_retention"),
        ({"evaluate": {"perplexity_ratio": math.nan}}, "perplexity_ratio"),
        ({"throughput": {"speed_up": math.nan}}, "speed_up"),
        ({"parity": {"max_logit_difference": math.nan}}, "parity"),
        ({"parity": {"max_logit_difference_cached": math.nan}}, "parity_cached"),
    ],
)
def test_a_figure_that_is_no_number_refuses(reports, name):
    check = judged(**reports)[name]
    assert not check.passed
    assert check.value is None
    assert "not a number" in check.reason
