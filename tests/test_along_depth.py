"""Refit and reconstruction on tiny random models: what they find for each sublayer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import few_tokens, random_llama
from family_models import CASES, random_model
from healing_settings import N, reconstructing

from finercut.healing import reconstruct
from finercut.healing.fidelity import HeldOut, logits_of
from finercut.model.loading import load_whole
from finercut.model.masking import masked
from finercut.selection import depth, refit
from finercut.sublayers import Sublayer

pytestmark = pytest.mark.slow  # trains


def fit(model, batch, removed, ridges=(0.01, 0.1, 1.0), stored=lambda name: None):
    """The refitted values, which the model now has."""
    found = depth.Depth(model, batch, removed, 8 * N, stored)
    return found.run(refit.ClosedForm(found, ridges))


def reconstructed(model, batch, removed, stored=lambda name: None, **changes):
    """The same after training."""
    found = depth.Depth(model, batch, removed, 8 * N, stored)
    return found.run(reconstruct.Reconstruction(found, reconstructing(**changes)))


# Refit


def streams(model, removed, kind, block, batch):
    """Of the whole model before the sublayer after (block, kind), and of the masked one before and after it."""
    caught = {}
    layer, following = model.model.layers[block], model.model.layers[block + 1]
    assert kind == "mlp"
    norms = {"before": layer.post_attention_layernorm, "after": following.input_layernorm}
    hooks = [
        n.register_forward_pre_hook(lambda _, a, name=name: caught.update({name: a[0]})) for name, n in norms.items()
    ]
    inputs = layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: caught.update(a=a[0]))
    with torch.no_grad(), masked(model, removed):
        model(batch)
    for hook in (*hooks, inputs):
        hook.remove()
    return caught


def test_a_refit_is_the_ridge_solution_of_numpy(tiny_model):
    # 1.attention is removed: 0.mlp is the first that is fitted, with nothing drifted before it.
    removed = [Sublayer(1, "attention")]
    batch = few_tokens(32, 3)
    model = load_whole(tiny_model)
    own = model.model.layers[0].mlp.down_proj.weight.detach().clone().double().numpy()
    seen = streams(model, removed, "mlp", 0, batch)
    caught = {}
    hook = model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda _, a: caught.update(t=a[0]))
    with torch.no_grad():
        model(batch)
    hook.remove()
    target, before, a = (x.double().numpy().reshape(-1, x.shape[-1]) for x in (caught["t"], seen["before"], seen["a"]))
    weights = 1 / (target**2).sum(1)
    first = np.arange(batch.numel()) % N == 0
    weights = np.where(
        first, 0, np.minimum(weights, depth.MOST_WEIGHT * np.sort(weights[~first])[(~first).sum() // 2 - 1])
    )
    ridge = 0.3
    diagonal = (weights[:, None] * a**2).sum(0)
    penalty = ridge * (diagonal + refit.LEAST_DIAGONAL * diagonal.mean())
    # Ridge towards the present weights, as least squares with one more row for each input.
    rows = np.vstack([np.sqrt(weights)[:, None] * a, np.diag(np.sqrt(penalty))])
    right = np.vstack([np.sqrt(weights)[:, None] * (target - before), np.sqrt(penalty)[:, None] * own.T])
    expected = np.linalg.lstsq(rows, right, rcond=None)[0].T
    fitted = fit(model, batch, removed, [ridge])
    found = fitted["model.layers.0.mlp.down_proj.weight"].numpy()
    assert np.abs(expected - own).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=2e-4)


def at(norms, model, batch, gone):
    """What goes into some norms of a model with sublayers masked."""
    caught = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, a, n=n: caught.update({n: a[0]})) for n in norms
    ]
    with torch.no_grad(), masked(model, gone):
        model(batch)
    for hook in hooks:
        hook.remove()
    return caught


def test_a_refit_lowers_what_is_missing_at_every_gap_on_its_own_tokens(tiny_model):
    removed = [Sublayer(1, "attention"), Sublayer(2, "mlp")]
    batch = few_tokens(32, 3)
    whole, fitted = load_whole(tiny_model), load_whole(tiny_model)
    fit(fitted, batch, removed)
    norms = [f"model.layers.{i}.{name}" for i, name in ((1, "post_attention_layernorm"), (3, "input_layernorm"))]
    target, before, after = (
        at(norms, model, batch, gone) for model, gone in ((whole, []), (whole, removed), (fitted, removed))
    )
    for norm in norms:
        missing = [
            ((target[norm] - found[norm]).norm(dim=-1) / target[norm].norm(dim=-1))[:, 1:].mean()
            for found in (before, after)
        ]
        assert missing[1] < 0.95 * missing[0]


def test_nothing_before_the_first_gap_is_fitted(tiny_model):
    fitted = fit(load_whole(tiny_model), few_tokens(64, 3), [Sublayer(2, "attention")])
    assert {name.split(".")[2] for name in fitted} <= {"1", "2", "3"}
    assert "model.layers.1.mlp.down_proj.weight" in fitted
    assert "model.layers.1.self_attn.o_proj.weight" not in fitted


@torch.no_grad()
def test_a_projection_that_writes_nothing_is_fitted_too():
    model = random_llama()
    model.model.layers[2].self_attn.o_proj.weight.zero_()  # a block added to deepen a model begins so
    found = fit(model, few_tokens(32, 3), [Sublayer(1, "mlp"), Sublayer(2, "mlp")])
    assert found
    assert all(value.isfinite().all() for value in found.values())


def test_a_ridge_too_small_for_inputs_that_repeat_changes_nothing():
    moments = refit._Full()
    moments.add(torch.ones(6, 3), torch.ones(6, 2), torch.ones(6))
    assert not moments.solve(-1.0).any()
    assert moments.explained(moments.solve(-1.0)) == 0
    assert moments.explained(moments.solve(0.01)) > 0.9


def test_what_follows_sees_the_rounded_weights(tiny_model):
    batch = few_tokens(16, 3)
    model = load_whole(tiny_model)
    stored = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    fitted = fit(model, batch, [Sublayer(1, "attention")], stored=stored.get)
    assert {value.dtype for value in fitted.values()} == {torch.bfloat16}
    for name, value in fitted.items():
        assert torch.equal(model.get_parameter(name), value.float())


FITTED = {
    "llama": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "opt": "fc2",
    "granite": "mlp.down_proj",
    "gemma2": "post_feedforward_layernorm",
    "olmo2": "post_feedforward_layernorm",
    "gpt_neox sequential": "mlp.dense_4h_to_h",
    "mixtral": "self_attn.o_proj",
}


@pytest.mark.parametrize("case", FITTED)
def test_every_kind_of_family_has_something_to_fit_and_gains_by_it(case):
    model_type, changes = CASES[case]
    removed = [Sublayer(1, "attention"), Sublayer(2, "mlp")]
    batch, held_out = few_tokens(32, 3), HeldOut(few_tokens(4, 4))
    whole, fitted = (random_model(model_type, **changes) for _ in range(2))
    held_out.expect(logits_of(whole), whole.device)
    with masked(fitted, removed):
        before = held_out.fidelity(logits_of(fitted), whole.device)
    found = fit(fitted, batch, removed)
    assert any(FITTED[case] in name for name in found)
    with masked(fitted, removed):
        after = held_out.fidelity(logits_of(fitted), whole.device)
    assert after.divergence < before.divergence


def test_parallel_blocks_are_refused_with_what_to_do():
    model_type, changes = CASES["gpt_neox"]
    with pytest.raises(
        ValueError, match="cannot fit a gpt_neox model, whose blocks are not .* take heal.method reconstruct"
    ):
        refit.fit(random_model(model_type, **changes), few_tokens(4, 3), [Sublayer(1, "mlp")], [0.1], 8 * N)


def test_one_window_is_refused(tiny_model):
    with pytest.raises(ValueError, match="two windows at least"):
        fit(load_whole(tiny_model), few_tokens(1, 3), [Sublayer(1, "mlp")])


# Reconstruction


def test_a_reconstruction_is_what_a_plain_loop_of_adam_finds(tiny_model):
    # 1.attention is removed: 0.mlp is the first that is trained, with nothing drifted before it.
    removed, steps = [Sublayer(1, "attention")], 6
    batch = few_tokens(32, 3)
    model = load_whole(tiny_model)
    names = ["model.layers.0.post_attention_layernorm", "model.layers.1.post_attention_layernorm"]
    before, target = at(names, model, batch, []).values()
    weights = 1 / target.square().sum(-1)
    weights = weights.clamp_max(depth.MOST_WEIGHT * weights[:, 1:].median())
    weights[:, 0] = 0
    layer = load_whole(tiny_model).model.layers[0]
    mine = [*layer.mlp.parameters(), *layer.post_attention_layernorm.parameters()]
    optimizer = torch.optim.Adam(mine)

    def missing(part):
        x, t, w = (value[part].detach() for value in (before, target, weights))
        return (w * (x + layer.mlp(layer.post_attention_layernorm(x)) - t).square().sum(-1)).sum()

    # The first quarter judges.
    judging, fitting = slice(8), slice(8, None)
    at_first = [missing(part).item() for part in (judging, fitting)]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * (step + 0.5) / steps))
        optimizer.zero_grad()
        (missing(fitting) / at_first[1]).backward()
        optimizer.step()
    explained = 1 - missing(judging).item() / at_first[0]
    assert explained > 0.02
    settings = {"ridges": [], "steps": steps, "eval_every": steps, "learning_rate": 1e-3, "warm_up": 0.0}
    found = depth.Depth(model, batch, removed, 24 * N)
    reconstruction, told = reconstruct.Reconstruction(found, reconstructing(batch_tokens=24 * N, **settings)), []

    def telling(place):
        told.append(reconstruction(place))
        return told[-1]

    values = found.run(telling)
    assert told[0].explained == pytest.approx(explained, rel=1e-3)
    for name in ("mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"):
        expected = layer.get_submodule(name).weight.detach()
        torch.testing.assert_close(values[f"model.layers.0.{name}.weight"], expected, rtol=0, atol=2e-5)
        assert (expected - load_whole(tiny_model).model.layers[0].get_submodule(name).weight).abs().max() > 2e-3


def test_only_sublayers_beside_a_gap_are_trained_on_request(tiny_model):
    removed = [Sublayer(1, "mlp"), Sublayer(2, "attention")]
    everywhere = reconstructed(load_whole(tiny_model), few_tokens(64, 3), removed, ridges=[], sublayers="all")
    beside = reconstructed(load_whole(tiny_model), few_tokens(64, 3), removed, ridges=[], sublayers="gaps")
    of = [{(int(name.split(".")[2]), "mlp" in name) for name in one if "_proj" in name} for one in (everywhere, beside)]
    assert of[0] == {(1, False), (2, True), (3, False), (3, True)}
    assert of[1] == {(1, False), (2, True)}


@pytest.mark.parametrize(("case", "trained"), [("gpt_neox", "attention.dense"), ("mixtral", "mlp.experts")])
def test_parallel_blocks_and_experts_are_reconstructed(case, trained):
    model_type, changes = CASES[case]
    removed = [Sublayer(1, "attention"), Sublayer(2, "mlp")]
    batch, held_out = few_tokens(32, 3), HeldOut(few_tokens(4, 4))
    whole, fitted = (random_model(model_type, **changes) for _ in range(2))
    stored = {name: p.detach().bfloat16() for name, p in fitted.named_parameters()}
    held_out.expect(logits_of(whole), whole.device)
    with masked(fitted, removed):
        before = held_out.fidelity(logits_of(fitted), whole.device)
    found = reconstructed(fitted, batch, removed, stored.get)
    assert any(trained in name for name in found)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert all(torch.equal(fitted.get_parameter(name), value.float()) for name, value in found.items())
    assert not any(p.requires_grad for p in fitted.parameters() if p.grad is not None)
    with masked(fitted, removed):
        after = held_out.fidelity(logits_of(fitted), whole.device)
    assert after.divergence < 0.95 * before.divergence
