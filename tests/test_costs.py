"""Costs that the config alone does not tell: the arithmetic of memory, the fit of times, and their stage."""

from __future__ import annotations

import pytest
import torch
from example_reports import prune, throughput
from test_selection import COSTS, SUBLAYERS

from finercut.checkpoint.records import Predicted
from finercut.model.fitted_costs import costs_with, fitted, memory, removal_sets, table
from finercut.model.records import CostsReport
from finercut.report.prediction import confirmed
from finercut.sublayers import Sublayer
from finercut.system.records import Spread
from pipelines import costs, paths
from pipelines.params import load, parse

GROUPS = [[s for s in SUBLAYERS if s.kind == kind] for kind in ("attention", "mlp")]


def test_memory_is_weights_and_the_cache_of_the_load():
    found = memory(COSTS, torch.bfloat16, 10)
    # 200 parameters of 2 bytes, 32 bytes of cache for each of 10 tokens
    assert found.whole * 2**30 == 400 + 320
    # an attention has 10 parameters and 8 bytes of cache a token, an MLP 30 parameters
    assert [round(found.by_sublayer[s] * 2**30) for s in SUBLAYERS[:2]] == [20 + 80, 60]


def ratios(width=0.0, both=1.0):
    """Of models less two of four attentions, of four MLPs, and both: base 8 ms, an attention 1, an MLP 2; 20 in all."""
    times, sets = (18, 16, 14 * both), removal_sets(GROUPS)
    return {
        tuple(removed): Spread(median=ms / 20, low=ms / 20 * (1 - width), high=ms / 20 * (1 + width))
        for removed, ms in zip(sets, times, strict=True)
    }


def test_the_fit_finds_what_a_sublayer_of_each_kind_takes():
    found = fitted(GROUPS, 20.0, ratios(width=0.05))
    assert (found.base_ms, *(group.ms for group in found.groups)) == pytest.approx((8, 1, 2))
    assert (found.spread, found.residual) == pytest.approx((0.05, 0), abs=1e-9)
    cost = table(found, SUBLAYERS)
    assert (cost.whole, cost.of([Sublayer(2, "mlp")]), cost.error) == pytest.approx((20, 2, 0.05))


def test_times_that_do_not_add_up_are_an_error_that_the_fit_states():
    # 14 ms for both halves gone is what adding up says; 15.4 were measured
    found = fitted(GROUPS, 20.0, ratios(both=1.1))
    assert 0.01 < found.residual < 0.1
    assert found.error == found.residual


def test_a_sublayer_that_seems_to_give_time_back_costs_nothing():
    sets = removal_sets(GROUPS)
    slower = dict(zip(map(tuple, sets), [Spread(median=m, low=m, high=m) for m in (1.05, 0.8, 0.85)], strict=True))
    attention, mlp = fitted(GROUPS, 20.0, slower).groups
    assert attention.ms == 0 < mlp.ms


def test_half_of_each_kind_goes_and_half_of_both_but_never_the_last_attention():
    names = [[str(s) for s in removed] for removed in removal_sets(GROUPS)]
    assert names[:2] == [["1.attention", "3.attention"], ["1.mlp", "3.mlp"]]
    assert names[2] == ["1.attention", "1.mlp", "3.attention", "3.mlp"]
    assert removal_sets([[Sublayer(0, "attention")], [Sublayer(0, "mlp")]]) == [[Sublayer(0, "mlp")]]


def in_unit(unit, amount):
    params = load()
    return params.model_copy(
        update={"prune": params.prune.model_validate({"budget": {"unit": unit, "amount": amount}}, strict=True)}
    )


def test_only_what_the_budget_needs_is_found(tmp_path, monkeypatch):
    parameters, gib = in_unit("parameters", 0.1), in_unit("memory_gib", 0.2)
    monkeypatch.chdir(tmp_path)
    paths.REPORTS.mkdir()
    assert costs.run(parameters) == CostsReport.read(paths.report("costs")) == CostsReport()
    # 8 requests of 64 + 64 tokens; no model is there, and none is needed
    assert costs.run(gib).memory_tokens == 8 * 128


def test_the_table_has_what_the_stage_found(tiny_model, tmp_path):
    from finercut.model.directory import ModelDirectory

    model, report = ModelDirectory(tiny_model), tmp_path / "costs.json"
    assert "memory" not in costs_with(model, report)
    CostsReport(memory_tokens=100).write(report)
    assert costs_with(model, report)["memory"].whole > 0
    CostsReport(whole_sha256="of another").write(report)
    with pytest.raises(ValueError, match="is of another model than .*: run `finercut costs`"):
        costs_with(model, report)


def test_a_cost_is_weighed_only_where_the_budget_has_it_measured():
    text = paths.PARAMS.read_text().replace("per: parameters", "per: time")
    with pytest.raises(ValueError, match="per = time goes with a prune.budget in speed_up or tpot_ms, not in par"):
        parse(text, "params.yaml")
    parse(text.replace("{unit: parameters, amount: 0.138}", "{unit: tpot_ms, amount: 20.0}"), "params.yaml")


def test_a_prediction_stands_beside_what_was_measured():
    spread = Spread(median=1.25, low=1.2, high=1.3)
    timed = throughput(speed_up_spread=spread)

    def told(low, high):
        predicted = {"speed_up": Predicted(value=1.31, low=low, high=high, asked=1.3)}
        (line,) = confirmed(prune().model_copy(update={"predicted": predicted}), timed)
        return line

    assert told(1.24, 1.38) == (
        "speed-up: asked 1.3, predicted 1.31 [1.24, 1.38], measured 1.25 [1.2, 1.3]: as predicted"
    )
    assert told(1.26, 1.36).endswith("THE PREDICTION WAS OFF by more than it stated")
    assert confirmed(prune(), timed) == []
