"""The evolutionary method, against full forwards of the masked model."""

import math
import random

import pytest
from conftest import random_llama
from test_swaps import divergences

from finercut.model.costs import costs_of_config
from finercut.selection import evolution
from finercut.selection.bench import Bench
from finercut.selection.goal import Goal
from finercut.selection.settings import Budget, Search
from finercut.sublayers import Candidate, parse
from pipelines.params import load

BAD = [parse(name) for name in ("0.attention", "0.mlp", "1.attention")]


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def asked(model):
    return goal(model)


def goal(model, generations=12, offspring=8, seed=0, amount=0.33, **changes):
    of_evolution = {"generations": generations, "offspring": offspring}
    values = load().search.model_dump() | {"method": "evolutionary", "evolution": of_evolution, "seed": seed} | changes
    return Goal(
        Search.model_validate(values), Budget(unit="parameters", amount=amount), costs_of_config(model.config), 4
    )


def evolved(model, tokens, asked, start=BAD, earlier=()):
    removed = [s for c in evolution.after(start, earlier) for s in c.sublayers]
    with Bench(model, tokens[:4], tokens[4:], removed=removed) as bench:
        return list(evolution.evolve(bench, asked, start, earlier))


@pytest.mark.parametrize("names", [["0.mlp", "3.mlp"], ["0.attention", "2.attention", "3.attention"], ["1.block"]])
def test_a_branch_may_put_sublayers_back_and_remove_others(model, tokens, names):
    removed = {s for c in BAD for s in c.sublayers}
    changed = {s for name in names for s in parse(name).sublayers}
    candidate, other = Candidate(tuple(sorted(changed))), parse("3.mlp")
    row = dict.fromkeys(sorted({candidate, other}), math.inf)
    with Bench(model, tokens[:4], tokens[4:], removed=removed) as bench:
        totals = bench.totals(dict.fromkeys(range(4), row))
        bench.change(changed)
        assert bench.removed == removed ^ changed
        now = bench.divergence_now()
    expected = divergences(model, tokens, [Candidate((s,)) for s in removed ^ changed])[0]
    assert math.fsum(math.fsum(totals[w][candidate]) for w in range(4)) / 96 == pytest.approx(expected, rel=1e-4)
    assert now == pytest.approx(expected, rel=1e-4)


def test_mutations_stay_within_the_budget_and_save_no_less(model):
    # 543,872 in all, 179,477 may go: an attention is 49,280, an MLP 73,856, a block 123,136
    asked = goal(model, candidates="any", protect=["2.mlp"])
    least = asked.saved(BAD)
    assert least == 49_280 + 73_856 + 49_280
    seen = set()
    for seed in range(200):
        child = evolution.mutated(asked, BAD, least, 3, random.Random(seed))
        assert least <= asked.saved(child) <= 0.33 * 543_872
        lost = [str(s) for c in child for s in c.sublayers]
        assert len(lost) == len(set(lost))
        assert "2.mlp" not in lost
        seen.add(frozenset(lost))
    assert len(seen) > 10  # of the 17 others with two attentions and an MLP
    assert evolution.at_random(asked) == evolution.at_random(asked)
    assert asked.saved(evolution.at_random(asked)) <= 0.33 * 543_872


def test_where_nothing_else_saves_as_much_there_are_no_offspring(model):
    blocks = [parse("1.block")]
    asked = goal(model, candidates="blocks", amount=0.25, protect=["0.block", "2.block", "3.block"])
    assert evolution.mutated(asked, blocks, asked.saved(blocks), 1, random.Random(0)) is None


def test_the_best_of_the_offspring_is_that_of_full_forwards(model, tokens, asked, monkeypatch):
    monkeypatch.setattr(evolution, "KEPT", 1)
    (generation,) = evolved(model, tokens, goal(model, generations=1))
    chance = random.Random("0 0")
    drawn = [evolution.mutated(asked, BAD, asked.saved(BAD), 3, chance) for _ in range(8)]
    found = {tuple(child): divergences(model, tokens, child) for child in drawn}
    best = min(found, key=lambda child: found[child][0])
    now = divergences(model, tokens, BAD)
    assert found[best][0] < now[0]
    assert found[best][1] <= now[1]
    assert set(evolution.after(BAD, [generation])) == set(best)
    assert (generation.divergence, generation.held_out_divergence) == pytest.approx(found[best], rel=1e-4)
    assert generation.n_offspring == len({frozenset(child) for child in drawn})


def test_no_generation_raises_either_divergence_and_a_bad_selection_improves(model, tokens, asked):
    generations = evolved(model, tokens, asked)
    assert len(generations) == 12
    now = divergences(model, tokens, BAD)
    first = now
    for n, generation in enumerate(generations, start=1):
        found = divergences(model, tokens, evolution.after(BAD, generations[:n]))
        assert (generation.divergence, generation.held_out_divergence) == pytest.approx(found, rel=1e-4)
        assert found[0] <= now[0] * (1 + 1e-6)
        assert found[1] <= now[1] * (1 + 1e-6)
        assert bool(generation.put_back) == (found != now)
        now = found
    assert now[0] < 0.8 * first[0]


def test_it_goes_on_after_a_kill_to_the_same_generations_and_another_seed_finds_others(model, tokens, asked):
    undisturbed = evolved(model, tokens, asked)
    for n in (0, 1, 5, 12):
        assert evolved(model, tokens, asked, earlier=undisturbed[:n]) == undisturbed[n:]
    assert evolved(model, tokens, goal(model, seed=1)) != undisturbed


def test_children_that_do_worse_on_the_first_windows_cost_no_more(model, tokens, asked, monkeypatch):
    seen = []
    totals = Bench.totals
    monkeypatch.setattr(Bench, "totals", lambda bench, part: seen.append(part) or totals(bench, part))
    evolved(model, tokens, goal(model, generations=1))
    n_children = [len(row) for part in seen for row in part.values()]
    assert [len(part) for part in seen] == [1, 1, 2]  # of 4 windows: an eighth, a half, all
    assert n_children[0] >= 4
    assert n_children[1] <= math.ceil(n_children[0] / 4)
    assert n_children[2] == n_children[3] == 1
