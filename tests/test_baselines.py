"""The methods that FinerCut is compared with, against the definitions computed from transformers' own outputs."""

import itertools
import math

import pytest
import torch
from conftest import random_llama
from torch.nn.functional import cosine_similarity, cross_entropy

from finercut.model.costs import costs_of_config
from finercut.model.masking import masked
from finercut.selection.baselines import ORDERS, influence
from finercut.selection.bench import Bench, measured
from finercut.selection.divergence import js
from finercut.selection.goal import Goal
from finercut.selection.greedy import search
from finercut.selection.settings import Budget, Search
from finercut.sublayers import Sublayer, candidates, parse
from pipelines.params import load


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture
def bench(model, tokens):
    with Bench(model, tokens[:4], tokens[4:]) as bench:
        yield bench


def goal(model, unit="parameters", amount=0.3, **changes):
    asked = Search.model_validate(
        load().search.model_dump() | {"mode": "exact", "candidates": "both", "per": None, "fill": False} | changes
    )
    return Goal(asked, Budget(unit=unit, amount=amount), costs_of_config(model.config), 4)


def order(bench, asked):
    return [str(c) for c in ORDERS[asked.settings.method](bench, asked)]


def streams(model, tokens):
    """(blocks + 1) streams, and the one between attention and MLP of each block: (windows, tokens, hidden) each."""
    between = []
    hooks = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: between.append(args[0]))
        for block in model.model.layers
    ]
    ends = []
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: ends.append(args[0])))
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return [*hidden[:-1], *ends], between


def turned(before, after):
    return 1 - cosine_similarity(before.double(), after.double(), dim=-1).mean().item()


def test_shortgpt_orders_blocks_by_their_influence(model, tokens, bench):
    whole, _ = streams(model, tokens[:4])
    expected = {f"{i}.block": turned(whole[i], whole[i + 1]) for i in range(4)}
    for name, value in expected.items():
        assert influence(bench, parse(name)) == pytest.approx(value, rel=1e-5)
    found = order(bench, goal(model, method="shortgpt", candidates="blocks"))
    assert found == sorted(expected, key=expected.get)


@pytest.mark.parametrize("kinds", ["attention", "mlp", "both"])
def test_llm_drop_orders_sublayers_by_how_little_they_turn_the_stream(model, tokens, bench, kinds):
    whole, between = streams(model, tokens[:4])
    turns = {f"{i}.attention": turned(whole[i], between[i]) for i in range(4)}
    turns |= {f"{i}.mlp": turned(between[i], whole[i + 1]) for i in range(4)}
    expected = {str(c): turns[str(c)] for c in candidates(4, kinds)}
    assert order(bench, goal(model, method="llm_drop", candidates=kinds)) == sorted(expected, key=expected.get)


def test_a_block_that_changes_nothing_has_no_influence_and_goes_first(tokens):
    model = random_llama()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    bench = Bench(model, tokens[:4], tokens[4:])
    assert influence(bench, parse("2.block")) == pytest.approx(0, abs=1e-12)
    assert influence(bench, parse("2.attention")) == pytest.approx(0, abs=1e-12)
    assert order(bench, goal(model, method="shortgpt", candidates="blocks"))[0] == "2.block"


@pytest.mark.parametrize(("amount", "n_blocks"), [(0.25, 1), (0.46, 2), (0.7, 3)])
def test_gromov_takes_the_window_that_turns_the_last_token_least_and_fills_the_budget(
    model, tokens, bench, amount, n_blocks
):
    whole, _ = streams(model, tokens[:4])

    def distance(start):
        before, after = whole[start][:, -1], whole[start + n_blocks][:, -1]
        return (cosine_similarity(before.double(), after.double(), dim=-1).acos() / math.pi).mean().item()

    best = min(range(4 - n_blocks + 1), key=distance)
    asked = goal(model, amount=amount, method="gromov", candidates="blocks")
    assert order(bench, asked) == [f"{i}.block" for i in range(best, best + n_blocks)]
    gone = [s for i in range(n_blocks) for s in (Sublayer(i, "attention"), Sublayer(i, "mlp"))]
    share = asked.costs["parameters"].share(gone)
    assert share <= amount < share / n_blocks * (n_blocks + 1)


def test_gromov_leaves_protected_blocks(model, bench):
    asked = goal(model, amount=0.46, method="gromov", candidates="blocks", protect=["1.mlp"])
    assert order(bench, asked) == ["2.block", "3.block"]


def test_one_shot_keeps_the_first_steps_values_where_greedy_judges_anew(tokens, model, bench):
    found = order(bench, goal(model, method="one_shot"))
    (first,) = search(model, tokens[:4], tokens[4:], 1, mode="brute")
    assert found == sorted(first.values, key=first.values.get)


def test_one_shot_takes_both_of_two_that_stand_in_for_each_other_and_greedy_one(tokens):
    # The second MLP is the first again: each alone is hardly missed, but without both much is.
    model = random_llama()
    blocks = model.model.layers
    with torch.no_grad():
        for block in blocks:
            block.self_attn.o_proj.weight.zero_()
        blocks[0].mlp.down_proj.weight.mul_(0.2)
        blocks[1].mlp.down_proj.weight.mul_(20)
        blocks[2].mlp.load_state_dict(blocks[1].mlp.state_dict())
    alone = order(Bench(model, tokens, tokens), goal(model, method="one_shot", candidates="mlp"))
    greedy = [r.sublayer for r in search(model, tokens, tokens, 4, kinds="mlp")]
    assert alone == ["3.mlp", "1.mlp", "2.mlp", "0.mlp"]
    assert greedy == ["3.mlp", "1.mlp", "0.mlp", "2.mlp"]


def losses(model, tokens, removed):
    with torch.no_grad(), masked(model, [s for c in removed for s in c.sublayers]):
        logits = model(tokens).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize(("kinds", "n_removals"), [("blocks", 3), ("both", 4)], ids=["sleb", "block_pruner"])
@pytest.mark.parametrize("mode", ["exact", "brute"])
def test_greedy_by_perplexity_is_brute_force(model, tokens, kinds, n_removals, mode):
    pool, removed = candidates(4, kinds), []
    for _ in range(n_removals):
        removed.append(min((c for c in pool if c not in removed), key=lambda c: losses(model, tokens, [*removed, c])))
    found = list(search(model, tokens, tokens, n_removals, divergence="perplexity", kinds=kinds, mode=mode))
    assert [r.sublayer for r in found] == list(map(str, removed))
    # the last token of each window of 24 predicts none
    last = losses(model, tokens, removed) * 23 / 24
    assert found[-1].divergence == pytest.approx(last, rel=1e-5)


def test_random_is_decided_by_the_seed_and_respects_what_is_protected(model, bench):
    orders = {seed: order(bench, goal(model, method="random", seed=seed, protect=["0.block"])) for seed in (0, 1)}
    assert orders[0] == order(bench, goal(model, method="random", seed=0, protect=["0.block"]))
    assert orders[0] != orders[1]
    expected = sorted(str(c) for c in candidates(4) if c.sublayers[0].block > 0)
    assert sorted(orders[0]) == sorted(orders[1]) == expected


def test_last_blocks_go_from_the_output(model, bench):
    assert order(bench, goal(model, method="last_blocks", candidates="blocks")) == [f"{i}.block" for i in (3, 2, 1, 0)]


def test_an_order_is_cut_at_the_budget_and_the_last_attention_is_passed_over(model):
    # an attention is 49,280 parameters of 543,872, an MLP 73,856
    names = ["3.mlp", "0.mlp", "1.attention", "2.mlp"]
    # 135,968 may go: with the second MLP, more than that. Filled, it is passed over for the attention.
    cut = goal(model, amount=0.25, method="random").take(map(parse, names))
    filled = goal(model, amount=0.25, method="random", fill=True).take(map(parse, names))
    assert [str(c) for c in cut] == ["3.mlp", "0.mlp"]
    assert [str(c) for c in filled] == ["3.mlp", "1.attention"]
    every = goal(model, amount=8, unit="sublayers", method="random", removals=7)
    names = [f"{i}.attention" for i in range(4)] + [f"{i}.mlp" for i in range(4)]
    assert "3.attention" not in map(str, every.take(map(parse, names)))
    with pytest.raises(ValueError, match="nothing may be removed after 3 removals"):
        every.take(map(parse, names[:4]))


def test_measured_divergences_are_those_of_the_masked_model(model, tokens, bench):
    names = ["2.block", "0.mlp", "3.attention"]
    steps = list(measured(bench, map(parse, names)))
    assert [(s.step, s.sublayer) for s in steps] == list(enumerate(names, start=1))
    with torch.no_grad():
        whole = model(tokens).logits
        for step, gone in zip(steps, itertools.accumulate(parse(n).sublayers for n in names), strict=True):
            with masked(model, gone):
                values = js(whole, model(tokens).logits).mean(-1)
            assert step.divergence == pytest.approx(values[:4].mean().item(), rel=1e-4)
            assert step.held_out_divergence == pytest.approx(values[4:].mean().item(), rel=1e-4)


def test_what_is_put_back_is_as_if_it_had_never_gone(bench, tokens):
    before = (bench.divergence_now(), [state.clone() for state in bench.trunk])
    bench.remove(parse("1.block").sublayers)
    bench.remove(parse("3.mlp").sublayers)
    bench.restore(parse("1.block").sublayers)
    bench.restore(parse("3.mlp").sublayers)
    assert bench.divergence_now() == before[0]
    assert all(torch.equal(now, then) for now, then in zip(bench.trunk, before[1], strict=True))
