"""What may be registered."""

import math

import example_reports
import pytest

from finercut.registry import gate

LIMITS = {"min_retention": 0.75, "min_speed_up": 1.25, "max_perplexity_ratio": 1.5}


def judged(claim=None, evaluate=None, throughput=None):
    checks = gate.check(
        [example_reports.claim(**claim or {})],
        example_reports.evaluate(**evaluate or {}),
        example_reports.throughput(**throughput or {}),
        **LIMITS,
    )
    return {c.name: c for c in checks}


def largest(difference):
    """The claim of pruning with this largest difference."""
    return {"claim": {"figures": {"max_logit_difference": difference, "n_tokens": 16}}}


def test_a_model_exactly_at_every_limit_passes():
    checks = judged(**largest(0.001))
    assert [(c.value, c.limit, c.passed) for c in checks.values()] == [
        (0.001, 0.001, True),
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
        (
            largest(0.01),
            "claim.prune",
            "the claim of prune, equals the masked whole model, does not hold (0.01; at most 0.001)",
        ),
    ],
)
def test_each_limit_refuses_alone_and_says_why(reports, name, reason):
    checks = judged(**reports)
    assert [c.name for c in checks.values() if not c.passed] == [name]
    assert checks[name].reason == reason


def test_a_whole_model_that_may_be_broken_is_refused_unless_that_is_allowed():
    evaluate = example_reports.evaluate(whole_doubts=("its perplexity is absurd",))
    reports = [example_reports.claim()], evaluate, example_reports.throughput()
    (failed,) = (c for c in gate.check(*reports, **LIMITS) if not c.passed)
    assert (failed.name, failed.reason) == ("whole_model", "the whole model may be broken: its perplexity is absurd")
    assert all(c.passed for c in gate.check(*reports, **LIMITS, allow_doubtful_whole=True))


def test_a_claim_that_does_not_hold_is_not_excused_by_its_figures():
    assert not judged(claim={"holds": False})["claim.prune"].passed


def test_a_claim_without_figures_counts_by_its_word():
    for holds in (True, False):
        check = judged(claim={"name": "heal", "figures": {}, "limit": None, "holds": holds})["claim.heal"]
        assert (check.passed, check.value, check.limit) == (holds, None, None)


def test_a_claim_with_figures_and_no_limit_counts_by_its_word_but_not_by_nan():
    figures = {"max_logit_difference": 0.0, "n_tokens": 16}
    check = judged(claim={"figures": figures, "limit": None})["claim.prune"]
    assert (check.passed, check.value, check.limit) == (True, 0.0, None)
    assert check.reason == "the claim of prune, equals the masked whole model, holds (0)"
    assert not judged(claim={"figures": figures, "limit": None, "holds": False})["claim.prune"].passed
    assert not judged(claim={"figures": {"max_logit_difference": math.nan}, "limit": None})["claim.prune"].passed


def test_one_nan_among_the_figures_of_a_claim_fails():
    figures = {"max_logit_difference": 0.0, "max_logit_difference_cached": math.nan}
    assert "(not a number; at most 0.001)" in judged(claim={"figures": figures})["claim.prune"].reason


def test_a_mean_difference_is_held_to_the_limit_too():
    figures = {"mean_logprob_difference": 0.3, "logprob_rounding": 0.4}
    check = judged(claim={"figures": figures, "limit": 0.5})["claim.prune"]
    assert (check.passed, check.value) == (True, 0.3)
    assert not judged(claim={"figures": figures, "limit": 0.2})["claim.prune"].passed


def test_every_claim_must_hold():
    claims = [example_reports.claim(), example_reports.claim(name="serve", holds=False)]
    checks = gate.check(claims, example_reports.evaluate(), example_reports.throughput(), **LIMITS)
    assert [c.name for c in checks if not c.passed] == ["claim.serve"]


def test_a_model_of_which_nothing_is_claimed_does_not_pass():
    checks = gate.check([], example_reports.evaluate(), example_reports.throughput(), **LIMITS)
    assert [(c.name, c.reason) for c in checks if not c.passed] == [
        ("claims", "no claim was checked; at least 1 is required")
    ]


@pytest.mark.parametrize(
    ("reports", "name"),
    [
        ({"evaluate": {"mean_retention": None}}, "mean_retention"),
        ({"evaluate": {"perplexity_ratio": math.nan}}, "perplexity_ratio"),
        ({"throughput": {"speed_up": math.nan}}, "speed_up"),
        (largest(math.nan), "claim.prune"),
    ],
)
def test_a_figure_that_is_no_number_refuses(reports, name):
    check = judged(**reports)[name]
    assert not check.passed
    assert check.value is None
    assert "not a number" in check.reason
