"""The rule of promotion, number by number."""

from __future__ import annotations

import math
import re

import example_reports
import pytest
from example_versions import task

from finercut.registry import promotion
from finercut.registry.evidence import Evidence
from finercut.serving.records import Spread

MARGINS = {"max_retention_drop": 0.125, "max_perplexity_rise": 0.25, "max_speed_up_drop": 0.5}
LIMITS = {"min_retention": 0.5, "min_speed_up": 1.0, "max_perplexity_ratio": 2.0}


def measured(version="2", tasks=None, held_out="3" * 64, evaluate=None, throughput=None, claim=None) -> Evidence:
    settings = {"tasks": tasks or {"a": task(0.75)}} | (evaluate or {})
    return Evidence(
        version=version,
        sha256="5" * 64,
        claims=(example_reports.claim(**claim or {}),),
        evaluate=example_reports.evaluate(**settings),
        throughput=example_reports.throughput(**throughput or {}),
        calibrate=example_reports.calibrate().model_copy(update={"held_out_sha256": held_out}),
        prune=example_reports.prune(),
        fetch=example_reports.fetch(),
    )


def compared(challenger, champion):
    return {c.name: c for c in promotion.compare(challenger, champion, **MARGINS)}


def failed(challenger, champion):
    return [name for name, check in compared(challenger, champion).items() if not check.passed]


def test_an_equal_challenger_passes():
    checks = compared(measured(), measured("1"))
    assert [(c.name, c.value, c.champion, c.passed) for c in checks.values()] == [
        ("retention", 0.75, 0.75, True),
        ("perplexity_ratio", 1.5, 1.5, True),
        ("speed_up", 1.25, 1.25, True),
    ]


@pytest.mark.parametrize(
    ("at_the_margin", "beyond", "name", "reason"),
    [
        (
            {"tasks": {"a": task(0.625)}},
            {"tasks": {"a": task(0.624)}},
            "retention",
            "retention is 0.624 over 1 common tasks; at least 0.625 is required",
        ),
        (
            {"evaluate": {"perplexity_ratio": 1.875}},
            {"evaluate": {"perplexity_ratio": 1.876}},
            "perplexity_ratio",
            "perplexity_ratio is 1.876 on the same tokens; at most 1.875 is required",
        ),
        (
            {"throughput": {"speed_up": 0.625}},
            {"throughput": {"speed_up": 0.624}},
            "speed_up",
            "speed_up is 0.624 under the same load; at least 0.625 is required",
        ),
    ],
)
def test_each_figure_may_be_worse_by_its_margin_and_no_more(at_the_margin, beyond, name, reason):
    champion = measured("1")
    assert failed(measured(**at_the_margin), champion) == []
    assert failed(measured(**beyond), champion) == [name]
    assert compared(measured(**beyond), champion)[name].reason == reason


def test_a_gain_in_one_figure_does_not_pay_for_a_loss_in_another():
    assert failed(measured(tasks={"a": task(0.5)}, throughput={"speed_up": 9.0}), measured("1")) == ["retention"]


def test_retention_is_compared_over_the_tasks_that_both_were_given_in_the_same_way():
    champion = measured("1", tasks={"a": task(0.9), "b": task(0.5), "c": task(0.1), "d": task(0.1), "e": task(0.1)})
    challenger = measured(
        tasks={
            "a": task(0.8),
            "b": task(0.7),
            "c": task(0.9, n_samples=50),
            "d": task(0.9, n_fewshot=5),
            "e": task(0.9, metric="f1"),
            "new": task(0.9),
        }
    )
    check = compared(challenger, champion)["retention"]
    assert (check.value, check.champion) == (pytest.approx(0.75), pytest.approx(0.7))
    assert "over 2 common tasks" in check.reason


@pytest.mark.parametrize("tasks", [{"b": task(0.9)}, {"a": task(None)}, {"a": task(0.9, n_fewshot=5)}])
def test_without_a_common_task_there_is_no_promotion(tasks):
    check = compared(measured(tasks=tasks), measured("1"))["retention"]
    assert not check.passed
    assert "evaluate one that the champion was evaluated on" in check.reason


def test_perplexity_counts_on_the_same_held_out_tokens_only():
    check = compared(measured(held_out="9" * 64, evaluate={"perplexity_ratio": 9.0}), measured("1"))["perplexity_ratio"]
    assert check.passed
    assert check.reason == "perplexity_ratio is not compared: measured with other held-out tokens"


@pytest.mark.parametrize(
    ("load", "name"),
    [
        ({"input_tokens": 16}, "input_tokens"),
        ({"output_tokens": 16}, "output_tokens"),
        ({"concurrency": 4}, "concurrency"),
        ({"n_warmups": 3}, "n_warmups"),
        ({"n_rounds": 9}, "n_rounds"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"enforce_eager": False}, "enforce_eager"),
        ({"hardware": "other"}, "hardware"),
        ({"engine": "vllm 0.33.0"}, "engine"),
        ({"torch_version": "2.14"}, "torch_version"),
        ({"interleave": False}, "interleave"),
        ({"kv_cache_gib": 8.0}, "kv_cache_gib"),
        ({"max_model_len": 2048}, "max_model_len"),
    ],
)
def test_speed_up_counts_under_the_same_load_only(load, name):
    check = compared(measured(throughput={"speed_up": 0.1, **load}), measured("1"))["speed_up"]
    assert check.passed
    assert check.reason == f"speed_up is not compared: measured with other {name}"


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({"lm_eval_version": "0.5"}, "lm_eval_version"),
        ({"dtype": "float32"}, "dtype"),
        ({"transformers_version": "5.20.0"}, "transformers_version"),
        ({"seed": 1}, "seed"),
    ],
)
def test_scores_of_another_lm_eval_or_dtype_are_not_compared(how, name):
    champion = measured("1", evaluate={"transformers_version": "5.19.0", "seed": 1234})
    how = {"transformers_version": "5.19.0", "seed": 1234} | how
    check = compared(measured(tasks={"a": task(0.1)}, evaluate=how), champion)["retention"]
    assert check.passed
    assert check.reason == f"retention is not compared: measured with other {name}"


def test_a_version_of_transformers_that_0_1_did_not_record_keeps_nothing_from_being_compared():
    newer = {"transformers_version": "5.19.0"}
    checks = compared(measured(tasks={"a": task(0.1)}, evaluate=newer | {"perplexity_ratio": 9.0}), measured("1"))
    assert [name for name, check in checks.items() if not check.passed] == ["retention", "perplexity_ratio"]


def test_perplexities_in_another_dtype_are_not_compared():
    check = compared(measured(evaluate={"dtype": "float32", "perplexity_ratio": 9.0}), measured("1"))[
        "perplexity_ratio"
    ]
    assert check.passed
    assert check.reason == "perplexity_ratio is not compared: measured with other dtype"


def test_a_difference_within_two_standard_errors_is_none():
    # Retention 0.75 of 0.6 / 0.8 with errors of 0.03 and 0.02: 0.75 * sqrt((0.03/0.6)^2 + (0.02/0.8)^2) = 0.0419.
    def noisy(retention):
        return {"a": task(retention, whole_stderr=0.02, pruned_stderr=0.03)}

    assert task(0.75, whole_stderr=0.02, pruned_stderr=0.03).retention_stderr == pytest.approx(0.041926, rel=1e-4)
    champion = measured("1", tasks=noisy(0.75))
    # The margin is 0.125; two errors of the difference are about 2 * sqrt(0.0419^2 + 0.035^2) = 0.108.
    assert failed(measured(tasks=noisy(0.53)), champion) == []
    assert failed(measured(tasks=noisy(0.5)), champion) == ["retention"]
    reason = compared(measured(tasks=noisy(0.5)), champion)["retention"].reason
    assert re.fullmatch(r"retention is 0\.5 .*; at least 0\.625 within the noise of 0\.1 is required", reason)


def test_the_error_of_a_mean_over_tasks_falls_with_their_number():
    def noisy(n):
        return {f"t{i}": task(0.75, whole_stderr=0.02, pruned_stderr=0.03) for i in range(n)}

    limits = [compared(measured(tasks=noisy(n)), measured("1", tasks=noisy(n)))["retention"].limit for n in (1, 4)]
    noise = [0.625 - limit for limit in limits]
    assert noise[1] == pytest.approx(noise[0] / 2)


def test_a_speed_up_within_the_rounds_spread_is_no_slower():
    def spread(low, high):
        return Spread(median=1.25, low=low, high=high)

    champion = measured("1", throughput={"speed_up_spread": spread(1.2, 1.3)})
    # Half of 1.25 is the margin's limit; half of each spread, 0.05 and 0.1, may be missing.
    for speed_up, expected in ((0.48, []), (0.47, ["speed_up"])):
        challenger = measured(throughput={"speed_up": speed_up, "speed_up_spread": spread(0.4, 0.6)})
        assert failed(challenger, champion) == expected


@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_noise_that_is_no_number_excuses_nothing(error):
    def noisy(retention):
        return {"a": task(retention, whole_stderr=error, pruned_stderr=error)}

    spread = Spread(median=1.25, low=-error, high=error)
    champion = measured("1", tasks=noisy(0.75), throughput={"speed_up_spread": spread})
    assert failed(measured(tasks=noisy(0.75), throughput={"speed_up_spread": spread}), champion) == []
    worse = measured(tasks=noisy(0.62), throughput={"speed_up": 0.6, "speed_up_spread": spread})
    assert failed(worse, champion) == ["retention", "speed_up"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"evaluate": {"perplexity_ratio": math.nan}}, "perplexity_ratio"),
        ({"throughput": {"speed_up": math.nan}}, "speed_up"),
        ({"tasks": {"a": task(math.nan)}}, "retention"),
    ],
)
def test_what_is_no_number_is_no_match(changes, name):
    assert failed(measured(**changes), measured("1")) == [name]
    assert failed(measured(), measured("1", **changes)) == [name]


def gated(allow_limited=False, **changes):
    return {c.name: c for c in promotion.gate_checks(measured(**changes), allow_limited=allow_limited, **LIMITS)}


def test_the_gate_counts_once_more_with_the_limits_of_today():
    assert all(check.passed for check in gated().values())
    assert [n for n, c in gated(evaluate={"mean_retention": 0.4}).items() if not c.passed] == ["mean_retention"]
    assert [n for n, c in gated(throughput={"speed_up": 0.9}).items() if not c.passed] == ["speed_up"]
    assert [n for n, c in gated(claim={"holds": False}).items() if not c.passed] == ["claim.prune"]


def test_tasks_evaluated_in_part_are_refused_unless_that_is_allowed():
    tasks = {"a": task(0.75), "b": task(0.75, n_samples=10)}
    check = gated(tasks=tasks)["limited_tasks"]
    assert (check.value, check.passed) == (1, False)
    assert check.reason == "evaluated in part: b (10 of 100); promote.allow_limited is false"
    assert gated(allow_limited=True, tasks=tasks)["limited_tasks"].passed
