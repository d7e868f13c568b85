"""Swaps after a selection, against full forwards of the masked model."""

import itertools

import pytest
import torch
from conftest import random_llama

from finercut.model.costs import costs_of_config
from finercut.model.masking import masked
from finercut.selection import swaps
from finercut.selection.bench import Bench
from finercut.selection.divergence import js
from finercut.selection.goal import Goal
from finercut.selection.settings import Budget, Search
from finercut.selection.swaps import Trial
from finercut.selection.trajectory import append, read_lines
from finercut.sublayers import candidates, parse
from pipelines.params import load

BAD = [parse(name) for name in ("0.attention", "0.mlp", "1.attention")]


@pytest.fixture(scope="module")
def model():
    return random_llama()


def any_other(others, out):
    return [c for c in candidates(4) if c not in others and c != out]


def swapped(model, tokens, n_rounds=3, earlier=(), order=BAD, replacements=any_other):
    removed = [s for c in swaps.after(order, earlier) for s in c.sublayers]
    with Bench(model, tokens[:4], tokens[4:], removed=removed) as bench:
        return list(swaps.swap(bench, order, n_rounds, replacements, earlier))


def divergences(model, tokens, removed):
    with torch.no_grad():
        whole = model(tokens).logits
        with masked(model, [s for c in removed for s in c.sublayers]):
            values = js(whole, model(tokens).logits).double().mean(-1)
    return values[:4].mean().item(), values[4:].mean().item()


def brute_force(model, tokens, order, n_rounds):
    order, trials = list(order), []
    now = divergences(model, tokens, order)
    for _ in range(n_rounds):
        any_taken = False
        for i, out in enumerate(list(order)):
            others = order[:i] + order[i + 1 :]
            found = {c: divergences(model, tokens, [*others, c]) for c in any_other(others, out)}
            best = min(found, key=lambda c: (found[c][0], c))
            taken = None
            if found[best][0] < now[0] and found[best][1] <= now[1]:
                order[i], now, taken, any_taken = best, found[best], best, True
            trials.append((str(out), taken and str(taken), now))
        if not any_taken:
            break
    return trials


def test_swaps_are_those_of_brute_force_and_end_when_a_round_replaces_nothing(model, tokens):
    expected = brute_force(model, tokens, BAD, 5)
    found = swapped(model, tokens, 5)
    assert [(t.put_back, t.taken) for t in found] == [(out, taken) for out, taken, _ in expected]
    for trial, (_, _, now) in zip(found, expected, strict=True):
        assert (trial.divergence, trial.held_out_divergence) == pytest.approx(now, rel=1e-4)
    assert any(t.taken for t in found), "a bad selection can be improved"
    assert not any(t.taken for t in found[-3:])
    assert len(found) < 5 * 3


def test_no_swap_raises_either_divergence(model, tokens):
    found = swapped(model, tokens)
    before = divergences(model, tokens, BAD)
    curve = [before, *((t.divergence, t.held_out_divergence) for t in found)]
    for (earlier, earlier_held), (later, later_held) in itertools.pairwise(curve):
        assert later <= earlier * (1 + 1e-6)
        assert later_held <= earlier_held * (1 + 1e-6)


def test_a_swap_that_only_fits_the_calibration_tokens_is_not_made(model, tokens):
    # held out: the windows on which the swap that calibration asks for does harm
    with Bench(model, tokens[:4], tokens[4:], removed=[s for c in BAD for s in c.sublayers]) as bench:
        bench.held_out_divergence = iter([0.1, 0.2, 0.3, 0.4]).__next__
        found = list(swaps.swap(bench, BAD, 1, any_other))
    assert [t.taken for t in found] == [None] * 3
    assert bench.removed == {s for c in BAD for s in c.sublayers}


def test_swaps_go_on_after_a_kill_to_the_same_trials(model, tokens):
    undisturbed = swapped(model, tokens)
    for n in range(len(undisturbed) + 1):
        assert swapped(model, tokens, earlier=undisturbed[:n]) == undisturbed[n:]


def test_a_replacement_stays_within_the_budget_and_saves_as_much(model):
    asked = Search.model_validate(load().search.model_dump() | {"candidates": "any", "protect": ["1.block"]})
    goal = Goal(asked, Budget(unit="parameters", amount=0.25), costs_of_config(model.config), 4)
    # 543,872 in all: 135,968 may go; an attention is 49,280, an MLP 73,856, a block 123,136
    attention, mlp = parse("0.attention"), parse("0.mlp")
    found = goal.replacements([mlp], attention)
    assert {str(c) for c in found} == {"2.attention", "3.attention"}
    assert {str(c) for c in goal.replacements([attention], mlp)} == {"2.mlp", "3.mlp"}
    assert {str(c) for c in goal.replacements([], mlp)} == {"2.mlp", "3.mlp", "0.block", "2.block", "3.block"}


def test_nothing_to_take_is_no_swap(model, tokens):
    found = swapped(model, tokens, replacements=lambda others, out: [])
    assert [t.taken for t in found] == [None] * 3


def test_trials_are_read_back_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "work" / "swaps.jsonl"
    assert read_lines(path, Trial) == []
    trials = [Trial(put_back=f"{i}.mlp", taken=None, divergence=0.1, held_out_divergence=0.2) for i in range(3)]
    for trial in trials:
        append(path, trial)
    assert read_lines(path, Trial) == trials
    whole = path.read_bytes()
    for torn in (whole[:-1], whole[:-30], whole + b'{"put_b'):
        path.write_bytes(torn)
        kept = read_lines(path, Trial)
        assert kept == trials[: len(kept)]
        assert len(kept) == torn.count(b"\n")
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[: len(kept)])


def test_what_is_taken_stands_where_what_is_put_back_did():
    trials = [
        Trial(put_back="0.mlp", taken="3.mlp", divergence=0.1, held_out_divergence=0.2),
        Trial(put_back="1.attention", taken=None, divergence=0.1, held_out_divergence=0.2),
        Trial(put_back="3.mlp", taken="2.block", divergence=0.1, held_out_divergence=0.2),
    ]
    assert list(map(str, swaps.after(BAD, trials))) == ["0.attention", "2.block", "1.attention"]
