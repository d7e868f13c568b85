"""The least increase per unit of cost: of tables of numbers the plain minimum, of a model what brute force finds."""

import math

import pytest
import torch
from conftest import random_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_race import POOL, run

from finercut.model.costs import Cost, costs_of_config
from finercut.model.masking import masked
from finercut.selection.divergence import js
from finercut.selection.greedy import search
from finercut.selection.per_cost import PerCost, carried_over
from finercut.sublayers import Sublayer, candidates, open_candidates

A, B, C, D = POOL[:4]


def flat(*windows):
    """One segment a window."""
    return [[float(value)] for value in windows]


def raced(table, base, cost, **options):
    n_windows, n_segments = len(base), len(next(iter(table.values()))[0])
    race = PerCost(list(table), n_windows, n_segments, base=base, cost=cost, **options)
    return *run(race, table), race


tables = st.integers(1, 9).flatmap(
    lambda n_windows: st.integers(1, 3).flatmap(
        lambda n_segments: st.tuples(
            st.lists(
                st.tuples(
                    st.lists(
                        st.lists(
                            st.sampled_from([0.0, 0.125, 0.25, 0.75, 1.5, math.inf]),
                            min_size=n_segments,
                            max_size=n_segments,
                        ),
                        min_size=n_windows,
                        max_size=n_windows,
                    ),
                    st.sampled_from([1.0, 2.0, 3.0, 8.0]),
                ),
                min_size=1,
                max_size=8,
            ),
            st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=n_windows, max_size=n_windows),
        )
    )
)


@settings(max_examples=200, deadline=None)
@given(tables, st.sampled_from(["exact", "lazy"]), st.booleans())
def test_the_least_ratio_is_found_and_bounds_are_below_the_values(rows, mode, with_known):
    rows, base = rows
    table = {c: segments for c, (segments, _) in zip(POOL, rows, strict=False)}
    cost = {c: price for c, (_, price) in zip(POOL, rows, strict=False)}
    whole = {c: sum(x for w in t for x in w) for c, t in table.items()}
    ratios = {c: (total - sum(base)) / cost[c] for c, total in whole.items()}
    # what was seen in an earlier step is a lower bound: then lazy is exact
    halves = {c: [sum(w) / 2 for w in t] for c, t in table.items() if whole[c] < math.inf}
    known = halves if with_known else {}
    outcome, _, race = raced(table, base, cost, mode=mode, known=known)
    least = min(ratios.values())
    if least < math.inf:
        assert race.best == pytest.approx(least)
        assert ratios[race.leader] == pytest.approx(least)
    for c, total in outcome.values.items():
        assert total == whole[c]
    for c, bound in (outcome.abandoned | outcome.stale).items():
        assert bound <= whole[c]
        assert ratios[c] >= least
    assert outcome.values.keys() | outcome.abandoned.keys() | outcome.stale.keys() == table.keys()
    assert mode == "lazy" or not outcome.stale


def test_a_cheap_candidate_of_less_divergence_loses_to_a_dear_one_of_less_a_parameter():
    table = {A: flat(1.5, 1.5), B: flat(2, 2)}
    outcome, _, race = raced(table, [1.0, 1.0], {A: 1.0, B: 3.0})
    assert min(outcome.values, key=outcome.values.get) == A
    assert race.leader == B
    assert race.best == pytest.approx(2 / 3)


def test_one_that_lowers_the_divergence_comes_first_whatever_it_costs():
    table = {A: flat(1, 1.001), B: flat(0.9, 0.9), C: flat(1, 1)}
    _, _, race = raced(table, [1.0, 1.0], {A: 1000.0, B: 1.0, C: 1000.0})
    assert race.leader == B
    assert race.best < 0


def test_a_candidate_is_given_up_inside_the_window_in_which_it_passes_the_best_ratio():
    # A, likely the least, to the end: 1 above the base for 1. B, at cost 2, may come to 8 + 2.
    table = {A: [[3, 3], [2, 1]], B: [[6, 5], [9, 9]], C: [[2, 2], [2, 3]]}
    base = [4.0, 4.0]
    outcome, n_windows, race = raced(table, base, {A: 1.0, B: 2.0, C: 1.0}, known={A: [1, 1]})
    assert race.leader == A
    assert outcome.abandoned == {B: 11.0}
    assert n_windows == 2 + 1 + 2


def test_increases_are_carried_over_to_the_next_step_but_not_next_to_the_removal():
    near, same, far = (candidates(8, "mlp")[block] for block in (3, 4, 6))
    removed = next(c for c in candidates(8, "attention") if c.sublayers == (Sublayer(4, "attention"),))
    known = {near: [3.0, 3.0], same: [5.0, 5.0], far: [3.0, 0.0]}
    # far raised the first window by 3 - 1, and so by as much beyond the 4 it is at now; the second was never seen
    assert carried_over(known, removed, before=[1.0, 1.0], after=[4.0, 5.0]) == {far: [6.0, 0.0]}


def test_lazy_gives_up_a_candidate_for_most_of_what_it_raised_the_divergence_by():
    # 0.8 of the increase of 5 that B is known for is 4 a window: more than A's 3. Of the increase of 3.5 it is 2.8.
    table = {A: flat(4, 4), B: flat(9, 9)}
    cost = {A: 1.0, B: 1.0}
    outcome, _, _ = raced(table, [1.0, 1.0], cost, mode="lazy", known={A: [2, 2], B: [6, 6]})
    assert outcome.stale == {B: 10.0}
    outcome, _, _ = raced(table, [1.0, 1.0], cost, mode="lazy", known={A: [2, 2], B: [4.5, 4.5]})
    assert outcome.stale == {}


def test_racing_has_no_ratios():
    with pytest.raises(ValueError, match="use exact or lazy"):
        PerCost([A], 1, 1, "racing", base=[0.0], cost={A: 1.0})


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def parameters(model):
    return costs_of_config(model.config)["parameters"]


def brute_force(model, tokens, n_removals, kinds, cost):
    """[(name, divergence)] of each step, by full forwards of the whole model with sublayers masked."""
    pool, removed, steps = candidates(4, kinds), [], []
    with torch.no_grad():
        whole = model(tokens).logits

        def divergence(gone):
            with masked(model, [s for c in gone for s in c.sublayers]):
                return js(whole, model(tokens).logits).double().mean().item()

        for _ in range(n_removals):
            base = divergence(removed)
            values = {c: divergence([*removed, c]) for c in open_candidates(pool, removed)}
            best = min(values, key=lambda c: ((values[c] - base) / cost.of(c.sublayers), c))
            removed.append(best)
            steps.append((str(best), values[best]))
    return steps


@pytest.mark.parametrize(("kinds", "n_removals"), [("both", 5), ("any", 4), ("blocks", 2)])
@pytest.mark.parametrize("mode", ["brute", "exact", "lazy"])
def test_removals_are_those_of_brute_force(model, parameters, tokens, kinds, n_removals, mode):
    expected = brute_force(model, tokens, n_removals, kinds, parameters)
    found = list(search(model, tokens, tokens, n_removals, kinds=kinds, per=parameters, mode=mode))
    assert [r.sublayer for r in found] == [name for name, _ in expected]
    assert [r.divergence for r in found] == pytest.approx([value for _, value in expected], rel=1e-4)
    if mode == "brute":
        return
    assert sum(r.sublayer_passes for r in found) < sum(
        r.sublayer_passes for r in search(model, tokens, tokens, n_removals, kinds=kinds, per=parameters, mode="brute")
    )


def test_costs_change_the_order(model, parameters, tokens):
    plain = [r.sublayer for r in search(model, tokens, tokens, 4)]
    dear_attentions = Cost("x", {s: 50.0 if s.kind == "attention" else 1.0 for s in parameters.by_sublayer}, 1000.0)
    priced = [r.sublayer for r in search(model, tokens, tokens, 4, per=dear_attentions, protect=["0.block"])]
    assert priced != plain
    assert [name.split(".")[1] for name in priced[:3]] == ["attention"] * 3


@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_continuing_gives_what_an_undisturbed_search_gives(model, parameters, tokens, mode):
    options = {"kinds": "any", "per": parameters, "mode": mode}
    undisturbed = list(search(model, tokens, tokens, 4, **options))
    for n_earlier in (1, 3):
        earlier = undisturbed[:n_earlier]
        assert list(search(model, tokens, tokens, 4, earlier=earlier, **options)) == undisturbed[n_earlier:]


def test_a_block_and_its_sublayers_exclude_each_other(model, tokens):
    names = [r.sublayer for r in search(model, tokens, tokens, 3, kinds="any", protect=["0.block", "1.block"])]
    lost = [s for name in names for s in ((f"{name[0]}.attention", f"{name[0]}.mlp") if "block" in name else (name,))]
    assert len(lost) == len(set(lost))
    with pytest.raises(ValueError, match=r"cannot remove 5 of 4 candidates \(4 are protected\)"):
        next(search(model, tokens, tokens, 5, kinds="any", protect=["0.block", "1.block"]))


def test_what_cannot_be_weighed_is_refused(model, parameters, tokens):
    with pytest.raises(ValueError, match="racing cannot weigh"):
        next(search(model, tokens, tokens, 1, per=parameters, mode="racing"))
    kv_cache = costs_of_config(model.config)["kv_cache"]
    with pytest.raises(ValueError, match=r"removing 0.mlp saves no bytes per token"):
        next(search(model, tokens, tokens, 1, per=kv_cache))
