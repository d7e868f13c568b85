"""Selections, budgets and how far a search goes, on a table of costs that can be added up by hand."""

from dataclasses import replace

import pytest

from finercut.model.costs import Cost, Costs
from finercut.report.pictures import removal_map
from finercut.selection.goal import Goal
from finercut.selection.selection import Chosen, Selection, given, left_over, whole_number
from finercut.selection.settings import Budget, Search
from finercut.sublayers import Sublayer, candidates, parse
from pipelines.params import load

SUBLAYERS = [s for c in candidates(4) for s in c.sublayers]
# Attention weighs 10 parameters, an MLP 30, of 200 in all (40 elsewhere); each attention caches 8 bytes a token.
COSTS = Costs(
    sublayers=Cost("sublayers", dict.fromkeys(SUBLAYERS, 1), 8),
    parameters=Cost("parameters", {s: 10 if s.kind == "attention" else 30 for s in SUBLAYERS}, 200),
    kv_cache=Cost("bytes per token", {s: 8 if s.kind == "attention" else 0 for s in SUBLAYERS}, 32),
)
ORDER = ["3.attention", "2.attention", "2.mlp", "1.attention"]


def selection(names=ORDER, nested=True, left=None):
    if left is None:
        left = [str(c) for c in left_over(4, "both", [], names)]
    return Selection(method="greedy", nested=nested, removals=[Chosen(candidate=n) for n in names], left=left)


def within(unit, amount, **options):
    return len(selection(**options).within(Budget(unit=unit, amount=amount), COSTS).removals)


def test_shares_are_read_from_the_table():
    removed = selection().sublayers
    assert COSTS.shares(removed) == {"sublayers": 4 / 8, "parameters": 60 / 200, "kv_cache": 24 / 32}


def test_budget_in_sublayers_by_number_and_by_share():
    assert within("sublayers", 3) == 3
    assert within("sublayers", 0.25) == 2
    assert within("sublayers", 4) == 4


def test_budget_in_parameters_stops_before_it_is_overrun():
    # 10, 20, 50, 60 of 200 are gone after each removal
    assert within("parameters", 0.1) == 2
    assert within("parameters", 0.2) == 2
    assert within("parameters", 0.25) == 3


def test_budget_in_kv_cache_counts_attention_only():
    assert within("kv_cache", 0.5) == 3


@pytest.mark.parametrize(("share", "n", "expected"), [(0.29, 100, 29), (0.57, 100, 57), (0.25, 60, 15), (0.15, 60, 9)])
def test_a_share_is_not_lost_to_rounding(share, n, expected):
    # 0.29 * 100 is 28.999999999999996 in binary
    assert whole_number(share, n) == expected


def test_a_number_is_taken_as_it_is():
    assert whole_number(7, 100) == 7


def test_a_budget_the_selection_does_not_reach_is_refused():
    with pytest.raises(ValueError, match="set search.removals to auto, or higher"):
        within("sublayers", 5)
    with pytest.raises(ValueError, match="set search.removals to auto, or higher"):
        within("parameters", 0.5)


def test_a_budget_below_the_first_removal_is_refused():
    with pytest.raises(ValueError, match="first removal, 3.attention, is already over"):
        within("parameters", 0.01)


def test_more_than_the_model_has_is_refused():
    with pytest.raises(ValueError, match="cannot remove 8 of 8 sublayers"):
        within("sublayers", 8)


def test_a_selection_that_is_not_nested_is_not_cut():
    assert within("sublayers", 4, nested=False) == 4
    with pytest.raises(ValueError, match="is not nested; select again for this budget"):
        within("sublayers", 3, nested=False)


def test_what_is_cut_off_is_left():
    cut = selection().first(2)
    assert cut.left[:2] == ["2.mlp", "1.attention"]
    assert cut.sublayers == [Sublayer(3, "attention"), Sublayer(2, "attention")]


def test_a_list_of_names_is_a_selection():
    assert given(["1.block", "0.mlp"]).sublayers == [Sublayer(1, "attention"), Sublayer(1, "mlp"), Sublayer(0, "mlp")]


def goal(unit, amount, removals="auto", **changes):
    search = Search.model_validate(
        load().search.model_dump() | {"candidates": "both", "per": None, "fill": False, "removals": removals} | changes
    )
    return Goal(search, Budget(unit=unit, amount=amount), COSTS, 4)


def test_a_share_of_the_candidates_is_of_those_that_blocks_have():
    chosen = goal("sublayers", 1, removals=0.5)
    without = {sublayer: int(sublayer.kind == "attention") for sublayer in COSTS["sublayers"].by_sublayer}
    attentions = Costs(COSTS | {"sublayers": Cost("sublayers", without, 4)})
    assert (chosen.n_removals, replace(chosen, costs=attentions).n_removals) == (4, 2)


def ends(chosen, order=ORDER):
    """At each length of the search: how many removals are needed, or None where it has to go on."""
    return [chosen.end(order[:n]) for n in range(len(order) + 1)]


def test_an_automatic_search_goes_as_far_as_the_budget_needs():
    assert ends(goal("sublayers", 0.25)) == [None, None, 2, 2, 2]
    # After two removals 20 of 50 are spent: the third, an MLP of 30, just fits, and nothing after it.
    assert ends(goal("parameters", 0.25)) == [None, None, None, 3, 3]
    # 45 are allowed: an attention might still have fitted after two, so the MLP that does not ends it.
    assert ends(goal("parameters", 0.225)) == [None, None, None, 3, 3]
    # 25 are allowed, 20 spent: no candidate fits.
    assert ends(goal("parameters", 0.125)) == [None, None, 2, 2, 2]
    # Half the KV cache is gone after two; MLPs cost none of it.
    assert ends(goal("kv_cache", 0.5)) == [None, None, 2, 2, 2]


def test_prune_takes_from_an_automatic_search_what_the_budget_allows():
    for unit, amount, expected in (("parameters", 0.225, 2), ("parameters", 0.25, 3), ("kv_cache", 0.5, 2)):
        names = ORDER[: goal(unit, amount).end(ORDER)]
        assert within(unit, amount, names=names) == expected


def test_a_number_of_removals_is_the_goal_whatever_the_budget():
    assert ends(goal("parameters", 0.25, removals=3)) == [None, None, None, 3, 3]
    assert goal("parameters", 0.25, removals=0.29).n_removals == 2
    assert goal("parameters", 0.25, removals=3).n_most == 3


def test_the_number_of_removals_is_estimated_from_what_they_cost():
    # 20 of 50 spent in two removals: 5 in all
    assert goal("parameters", 0.25).estimate(ORDER[:2]) == 5
    assert goal("parameters", 0.25, removals=3).estimate([]) == 3


@pytest.mark.parametrize(
    ("unit", "amount", "changes", "message"),
    [
        ("parameters", 0.9, {}, "is more than all candidates .* 0.75: lower the budget"),
        ("parameters", 0.04, {}, "is less than any single candidate .* raise the budget"),
        (
            "kv_cache",
            0.5,
            {"candidates": "mlp"},
            "no candidate of search.candidates = mlp .* saves any of it",
        ),
        ("sublayers", 8, {}, "cannot remove 8 of 8 sublayers"),
        ("sublayers", 2, {"removals": 9}, "cannot remove 9 of 8 candidates"),
        ("sublayers", 2, {"removals": 8}, "cannot remove 8 of 8 candidates; beside search.protect .* 7 can go"),
        ("sublayers", 2, {"removals": 8, "candidates": "any"}, "cannot remove 8 of 12 candidates; .* 7 can go"),
        ("sublayers", 2, {"removals": 7, "protect": ["0.block"]}, "cannot remove 7 of 8 candidates; .* 6 can go"),
        # Blocks 0 to 3 are out of reach until 7 removals, and there are no others.
        ("sublayers", 2, {"removals": 2, "exclude": 0.8}, "beside search.protect and search.exclude .*, 0 can go"),
        (
            "sublayers",
            2,
            {"exclude": 0.8},
            "that search.protect and search.exclude leaves saves any of it: choose other search.candidates, or less of",
        ),
    ],
)
def test_a_budget_that_cannot_be_reached_is_refused_before_the_search(unit, amount, changes, message):
    with pytest.raises(ValueError, match=message):
        goal(unit, amount, **{"removals": "auto"} | changes).check()


def test_the_last_attention_is_never_left_over():
    left = left_over(4, "both", [], ["0.attention", "1.attention", "2.attention"])
    assert "3.attention" not in map(str, left)
    assert "3.mlp" in map(str, left)


# Each attention takes 1 ms of a token, an MLP 2, and what stays 8: 20 in all. A model less ORDER takes 19, 18, 16, 15.
MS = Cost("ms per output token", {s: 1 if s.kind == "attention" else 2 for s in SUBLAYERS}, 20, error=0.1)
TIMED = Costs(COSTS | {"time": MS, "tpot": MS, "memory": Cost("GiB", COSTS["parameters"].by_sublayer, 200)})


@pytest.mark.parametrize(
    ("unit", "amount", "expected"),
    [("speed_up", 1.25, 3), ("speed_up", 1.2, 3), ("speed_up", 1.05, 1), ("tpot_ms", 17, 3), ("memory_gib", 185, 2)],
)
def test_a_target_takes_the_fewest_removals_that_reach_it(unit, amount, expected):
    chosen = replace(goal(unit, amount, fill=True), costs=TIMED)
    assert ends(chosen) == [None if n < expected else expected for n in range(len(ORDER) + 1)]
    assert len(selection().within(Budget(unit=unit, amount=amount), TIMED).removals) == expected
    assert [str(c) for c in chosen.take(map(parse, ORDER))] == ORDER[:expected]


def test_what_goes_in_place_of_a_removal_reaches_the_target_too():
    # 4 ms have to go; beside two attentions only an MLP saves the other two
    chosen = replace(goal("speed_up", 1.25), costs=TIMED)
    *kept_out, out = map(parse, ORDER[:3])
    assert {str(c) for c in chosen.replacements(kept_out, out)} == {"0.mlp", "1.mlp", "3.mlp"}
    # and not as much as the removals before, where these saved more than needed
    assert chosen.least(map(parse, ORDER)) == pytest.approx(4)


@pytest.mark.parametrize(
    ("unit", "amount", "message"),
    [
        # all but one attention gone: 8 + 1 ms of 20
        ("speed_up", 3, "cannot be reached: without all candidates .* the model comes to 2.222"),
        ("tpot_ms", 20, "the whole model comes to 20 already"),
        ("memory_gib", 10, "cannot be reached: .* comes to 50"),
    ],
)
def test_a_target_that_cannot_be_reached_says_what_can(unit, amount, message):
    with pytest.raises(ValueError, match=message):
        replace(goal(unit, amount), costs=TIMED).check()


def test_a_target_nobody_measured_names_the_stage_that_does():
    with pytest.raises(ValueError, match="prune.budget in speed_up needs the costs in time, .* run `finercut costs`"):
        goal("speed_up", 1.25).check()


def test_a_selection_that_ends_before_the_target_is_refused():
    with pytest.raises(ValueError, match="ends after 4 removals, at speed_up 1.333; prune.budget asks for 1.4"):
        selection(left=[]).within(Budget(unit="speed_up", amount=1.4), TIMED)


def test_a_prediction_is_no_share_that_is_saved():
    assert TIMED.shares(selection().sublayers).keys() == {"sublayers", "parameters", "kv_cache", "memory"}


def test_a_picture_of_a_model_whose_path_has_dollars_is_drawn(tmp_path):
    removal_map(selection(), 4, tmp_path / "map.png", "/data/$a\\b$/model: 4 of 8 sublayers removed")
    assert (tmp_path / "map.png").stat().st_size > 0
