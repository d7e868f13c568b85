"""The search against brute force by another route: full forwards of the masked, unmodified transformers model."""

import math

import pytest
import torch
from conftest import random_llama

from finercut.blocks import Blocks
from finercut.checkpoint import masked
from finercut.divergence import DIVERGENCES
from finercut.families import PRE_NORM
from finercut.greedy import search
from finercut.sublayers import candidates
from finercut.sweep import CPU_MICRO_BATCH, Sweep
from finercut.workers import Workers


@pytest.fixture(scope="module")
def model():
    return random_llama()


def brute_force(model, tokens, n_removals, divergence="js", kinds="both"):
    """[(name, {name: divergence})] of every step, by full forwards of the whole model with sublayers masked."""
    pool, removed, steps = candidates(4, kinds), [], []
    with torch.no_grad():
        whole = model(tokens).logits
        for _ in range(n_removals):
            values = {}
            for candidate in pool:
                if candidate in removed:
                    continue
                gone = [s for c in (*removed, candidate) for s in c.sublayers]
                with masked(model, gone):
                    values[candidate] = DIVERGENCES[divergence](whole, model(tokens).logits).mean().item()
            best = min(values, key=values.__getitem__)
            removed.append(best)
            steps.append((str(best), {str(c): v for c, v in values.items()}))
    return steps


@pytest.mark.parametrize("kinds", ["both", "attention", "mlp", "blocks"])
def test_removals_and_values_equal_brute_force(model, tokens, kinds):
    n_removals = {"both": 4, "blocks": 2}.get(kinds, 3)
    expected = brute_force(model, tokens, n_removals, kinds=kinds)
    found = list(search(model, tokens, tokens, n_removals, kinds=kinds, abandon=False))
    assert [r.sublayer for r in found] == [name for name, _ in expected]
    for removal, (_, values) in zip(found, expected, strict=True):
        assert removal.values == pytest.approx(values, rel=1e-4, abs=1e-6)
        assert removal.divergence == removal.values[removal.sublayer]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_abandoning_changes_neither_removals_nor_divergences(model, tokens, divergence):
    every = list(search(model, tokens, tokens, 5, divergence=divergence, abandon=False))
    some = list(search(model, tokens, tokens, 5, divergence=divergence))
    assert [(r.sublayer, r.divergence) for r in some] == [(r.sublayer, r.divergence) for r in every]
    assert sum(r.sublayer_passes for r in some) < sum(r.sublayer_passes for r in every)
    for fewer, all_ in zip(some, every, strict=True):
        assert fewer.values.keys() | fewer.abandoned.keys() == all_.values.keys()
        for name, bound in fewer.abandoned.items():
            assert fewer.divergence < bound <= all_.values[name] * (1 + 1e-6)


def test_held_out_divergence_is_measured_on_the_held_out_tokens(model, tokens):
    calibration, held_out = tokens[:3], tokens[3:]
    (first,) = search(model, calibration, held_out, 1)
    ((_, values),) = brute_force(model, held_out, 1)
    assert first.held_out_divergence == pytest.approx(values[first.sublayer], rel=1e-4)


def test_continuing_gives_what_an_undisturbed_search_gives(model, tokens):
    undisturbed = list(search(model, tokens, tokens, 5))
    continued = list(search(model, tokens, tokens, 5, earlier=undisturbed[:2]))
    assert continued == undisturbed[2:]


def test_prefix_reuse_runs_a_candidate_from_its_own_depth_only(model, tokens):
    # One window: the candidate that is n sublayers from the end costs n - 1 passes, 0 + 1 + ... + 7 = 28 in all.
    (first,) = search(model, tokens[:1], tokens[:1], 1, abandon=False)
    assert first.sublayer_passes == 28
    assert first.brute_force_sublayer_passes == 8 * 7


def test_equal_candidates_go_shallower_first(tokens):
    model = random_llama()
    with torch.no_grad():
        for index in (1, 2):
            model.model.layers[index].self_attn.o_proj.weight.zero_()
    first, second = search(model, tokens, tokens, 2)
    assert (first.sublayer, second.sublayer) == ("1.attention", "2.attention")
    assert first.divergence == pytest.approx(0, abs=1e-6)


def test_protected_sublayers_stay(model, tokens):
    names = [r.sublayer for r in search(model, tokens, tokens, 4, protect=["0.block", "3.attention", "2.mlp"])]
    assert sorted(names) == ["1.attention", "1.mlp", "2.attention", "3.mlp"]
    with pytest.raises(ValueError, match=r"cannot remove 5 of 4 candidates \(4 are protected\)"):
        next(search(model, tokens, tokens, 5, protect=["0.block", "3.attention", "2.mlp"]))


def test_the_front_stays_until_the_authors_number_of_removals(model, tokens):
    # x = 0.25 of 8: blocks 0 and 1 are out of reach for the first three removals
    found = [r.sublayer for r in search(model, tokens, tokens, 4, exclude=0.25)]
    assert all(name[0] in "23" for name in found[:3])


def test_the_last_attention_stays(model, tokens):
    names = [r.sublayer for r in search(model, tokens, tokens, 3, kinds="attention")]
    assert len(set(names)) == 3
    with pytest.raises(ValueError, match="nothing may be removed after 3 removals"):
        list(search(model, tokens, tokens, 4, kinds="attention"))


def test_a_candidate_with_non_finite_output_is_never_removed(model, tokens):
    with torch.inference_mode():
        blocks = Blocks(model, PRE_NORM, tokens[:1])
        sweep = Sweep(blocks, tokens, DIVERGENCES["js"], Workers(model.device), CPU_MICRO_BATCH)
        # What the branch without block 1's attention starts from; the others start before or after it.
        sweep.trunk[2] = torch.full_like(sweep.trunk[2], math.nan)
    pool = candidates(4)
    totals = sweep.totals({0: dict.fromkeys(pool, math.inf)})[0]
    assert {str(c) for c, segments in totals.items() if math.inf in segments} == {"1.attention"}


def test_a_whole_model_with_non_finite_logits_is_refused(tokens):
    model = random_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="whole model's logits are not finite"):
        next(search(model, tokens, tokens, 1))
