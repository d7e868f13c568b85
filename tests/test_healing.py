"""The step `heal` and its methods on tiny random models."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import few_tokens
from family_models import CASES, HYBRIDS, OTHERS, random_model
from safetensors.torch import load_file, save_file

from finercut.checkpoint import heal, prune
from finercut.checkpoint.lineage import lineage_of
from finercut.checkpoint.settings import Heal
from finercut.checkpoint.steps import Inputs, Proof
from finercut.checkpoint.writing import differing_tensors, write_pruned
from finercut.healing import distill, reconstruct, schedule
from finercut.healing.fidelity import compare, fidelity, logits_of
from finercut.healing.settings import Distill, Reconstruct, Refit
from finercut.healing.task import Task
from finercut.model.directory import ModelDirectory
from finercut.model.families import LAYOUT_KEY
from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.model.probe import find_layout
from finercut.selection import depth, refit
from finercut.selection.divergence import js
from finercut.sublayers import Sublayer
from finercut.tokens import Tokens

pytestmark = pytest.mark.slow  # trains

REMOVED = ["1.mlp", "2.attention"]
CPU = torch.device("cpu")
N = 24


def distilling(**changes):
    settings = {
        "method": "distill",
        "trainable": "blocks",
        "lora_rank": 8,
        "tokens": 16 * 4 * N,
        "minutes": None,
        "batch_tokens": 4 * N,
        "learning_rate": 1e-3,
        "warm_up": 0.1,
        "ce_weight": 0.0,
        "eval_every": 4,
        "patience": None,
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
    }
    return Distill(**settings | changes)


def refitting(**changes):
    settings = {"method": "refit", "ridges": [0.01, 0.1, 1.0], "fractions": [0.5, 1.0], "batch_tokens": 8 * N}
    return Refit(**settings | {"dtype": "float32", "device": "cpu"} | changes)


def reconstructing(**changes):
    settings = {"method": "reconstruct", "sublayers": "all", "ridges": [0.01, 0.1, 1.0], "steps": 20, "warm_up": 0.1}
    settings |= {"batch_tokens": 8 * N, "learning_rate": 3e-3, "eval_every": 5, "fractions": [0.5, 1.0], "seed": 0}
    return Reconstruct(**settings | {"dtype": "float32", "device": "cpu"} | changes)


def fit(model, batch, removed, ridges=(0.01, 0.1, 1.0), stored=lambda name: None):
    """The refitted values, which the model now has."""
    found = depth.Depth(model, batch, removed, 8 * N, stored)
    return found.run(refit.ClosedForm(found, ridges))


def reconstructed(model, batch, removed, stored=lambda name: None, **changes):
    """The same after training."""
    found = depth.Depth(model, batch, removed, 8 * N, stored)
    return found.run(reconstruct.Reconstruction(found, reconstructing(**changes)))


@pytest.fixture(scope="module")
def tokens_to_heal():
    return Tokens(calibration=few_tokens(4, 0), held_out=few_tokens(4, 1), healing=few_tokens(64, 2))


@pytest.fixture(scope="module")
def pruned(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("healing") / "pruned"
    prune.prune(tiny_model, REMOVED, None, directory)
    return ModelDirectory(directory)


@pytest.fixture
def run(tiny_model, pruned, tokens_to_heal, tmp_path):
    """Heals the tiny pruned model; the report, the checkpoint, and the figures it sent."""

    def run(settings, name="healed", tokens=tokens_to_heal):
        directory = tmp_path / name
        directory.mkdir()
        sent = []
        whole = ModelDirectory(tiny_model)
        inputs = Inputs(
            lambda: tokens, None, whole, tmp_path / "work", lambda figures, step: sent.append((step, figures))
        )
        report = heal.apply(pruned, directory, settings, inputs)
        report.write(tmp_path / "heal.json")
        return report, ModelDirectory(directory), sent

    return run


@pytest.fixture
def proof(tiny_model, tokens_to_heal, tmp_path):
    whole = ModelDirectory(tiny_model)
    return Proof(tokens_to_heal.held_out, 1e-3, CPU, whole=whole, report=tmp_path / "heal.json")


def in_blocks(names):
    return {name for name in names if name.startswith("model.layers.")}


# What all methods have in common


def test_fidelity_is_the_mean_js_and_the_perplexity_of_the_text(tiny_model, pruned, tokens_to_heal):
    whole, other = load_whole(tiny_model), load_pruned(pruned)
    held_out = tokens_to_heal.held_out
    with torch.no_grad():
        expected = js(whole(held_out).logits, other(held_out).logits).mean().item()
        surprise = other(held_out, labels=held_out).loss.item()
    found = fidelity(logits_of(whole), logits_of(other), held_out)
    assert found.divergence == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(surprise), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [distilling(), distilling(trainable="lora", learning_rate=5e-3), refitting(), reconstructing()],
    ids=["distill", "lora", "refit", "reconstruct"],
)
def test_a_healed_checkpoint_is_closer_to_the_whole_model_and_its_claim_holds(
    run, pruned, tiny_model, tokens_to_heal, proof, settings
):
    report, healed, sent = run(settings)
    before, after = compare(ModelDirectory(tiny_model), [pruned, healed], tokens_to_heal.held_out, CPU)
    assert after.divergence < 0.99 * before.divergence
    assert (report.divergence_before, report.divergence_after) == (before.divergence, after.divergence)
    assert (report.perplexity_before, report.perplexity_after) == (before.perplexity, after.perplexity)
    assert report.sha256 == healed.weights_sha256 != pruned.weights_sha256
    assert sent
    claim = heal.claim(pruned, healed, proof)
    assert claim.holds, claim
    assert claim.figures["divergence_after"] == after.divergence


@pytest.mark.parametrize(
    "settings",
    [distilling(), distilling(trainable="lora", learning_rate=5e-3), refitting(), reconstructing()],
    ids=["distill", "lora", "refit", "reconstruct"],
)
def test_only_reported_tensors_of_blocks_change_and_the_others_not_by_a_bit(run, pruned, settings):
    report, healed, _ = run(settings)
    before, after = (load_file(d.path / "model.safetensors") for d in (pruned, healed))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(report.changed) == in_blocks(changed)
    assert changed
    assert {(t.dtype, t.shape) for t in before.values()} == {(t.dtype, t.shape) for t in after.values()}
    config = [json.loads((d.path / "config.json").read_text()) for d in (pruned, healed)]
    assert [step.step for step in lineage_of(healed)] == ["prune", "heal"]
    for one in config:
        del one["finercut"]["lineage"]
    assert config[0] == config[1]


def test_the_lineage_says_how_and_on_what_it_was_healed(run, pruned, tokens_to_heal):
    settings = distilling(eval_every=16)
    report, healed, _ = run(settings)
    made = lineage_of(healed)[-1]
    assert made.settings == settings.model_dump()
    assert made.parent_sha256 == pruned.weights_sha256
    assert (made.n_tokens, made.tokens_sha256) == (16 * 4 * N, tokens_to_heal.healing_sha256)
    assert report.n_tokens == made.n_tokens
    assert "n_tokens" not in json.loads((healed.path / "config.json").read_text())["finercut"]["lineage"][0]


def test_the_card_no_longer_says_that_nothing_was_trained(run, pruned):
    _, healed, _ = run(refitting())
    before, after = ((d.path / "README.md").read_text() for d in (pruned, healed))
    assert "without training" in before
    assert "without training" not in after
    assert after.index("## Healed") < after.index("## Load")


def test_a_divergence_that_rises_leaves_the_parent(run, pruned, proof, caplog):
    report, healed, _ = run(distilling(learning_rate=3.0))
    assert "the checkpoint stays as it is" in caplog.text
    assert report.changed == []
    assert report.divergence_after == report.divergence_before
    for file in pruned.path.iterdir():
        assert (healed.path / file.name).samefile(file)
    assert heal.claim(pruned, healed, proof).holds


@pytest.mark.parametrize("method", [refitting, reconstructing])
def test_a_fit_to_other_text_than_the_held_out_leaves_the_parent(run, pruned, tokens_to_heal, method):
    # Windows of one token: what they ask for is wrong everywhere else.
    narrow = dataclasses.replace(tokens_to_heal, healing=torch.full((8, N), 7))
    report, healed, _ = run(method(ridges=[1e-2], fractions=[1.0]), tokens=narrow)
    assert report.changed == []
    assert healed.weights_sha256 == pruned.weights_sha256


def test_without_healing_tokens_the_calibrations_are_taken_with_a_warning(run, tokens_to_heal, caplog):
    few = dataclasses.replace(tokens_to_heal, calibration=few_tokens(64, 2), healing=None)
    _, healed, _ = run(refitting(), tokens=few)
    assert "no tokens for healing; taking its 64 windows" in caplog.text
    _, same, _ = run(refitting(), name="again")
    assert healed.weights_sha256 == same.weights_sha256


@pytest.mark.parametrize("what", ["unlisted", "config", "shape", "other weights"])
def test_the_claim_does_not_hold_where_something_else_changed(run, pruned, proof, tmp_path, what):
    report, healed, _ = run(refitting())
    file = healed.path / "model.safetensors"
    tensors = load_file(file)
    if what == "config":
        config = json.loads((healed.path / "config.json").read_text())
        (healed.path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    elif what == "shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][None]
    else:
        name = report.changed[0] if what == "other weights" else "model.norm.weight"
        tensors[name] = tensors[name] * 1.001
    save_file(tensors, file, {"format": "pt"})
    report.model_copy(update={"sha256": ModelDirectory(healed.path).weights_sha256}).write(tmp_path / "heal.json")
    if what == "other weights":
        report.write(tmp_path / "heal.json")
    assert not heal.claim(pruned, ModelDirectory(healed.path), proof).holds


def test_the_claim_does_not_hold_for_a_worse_checkpoint(run, pruned, proof, tmp_path):
    report, healed, _ = run(refitting())
    tensors = load_file(healed.path / "model.safetensors")
    tensors[report.changed[0]] *= 20
    save_file(tensors, healed.path / "model.safetensors", {"format": "pt"})
    worse = ModelDirectory(healed.path)
    report.model_copy(update={"sha256": worse.weights_sha256}).write(tmp_path / "heal.json")
    claim = heal.claim(pruned, worse, proof)
    assert not claim.holds
    assert claim.figures["divergence_after"] > claim.figures["divergence_before"]


def test_tensors_that_differ_in_a_bit_of_nan_or_zero_differ(tmp_path, pruned):
    for name, value in (("one", 0.0), ("other", -0.0)):
        shutil.copytree(pruned.path, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.norm.weight"][0] = value
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    assert differing_tensors(ModelDirectory(tmp_path / "one"), ModelDirectory(tmp_path / "other")) == [
        "model.norm.weight"
    ]


# Distillation


def test_training_starts_at_the_pruned_model_and_ends_with_its_best_state(run, caplog):
    caplog.set_level(logging.INFO)
    report, _, sent = run(distilling())
    found = {
        step: figures["heal.held_out_divergence"] for step, figures in sent if "heal.held_out_divergence" in figures
    }
    assert list(found) == [4, 8, 12, 16]
    assert report.divergence_after == pytest.approx(min(found.values()), rel=1e-4)
    losses = [figures["heal.loss"] for _, figures in sent if "heal.loss" in figures]
    assert len(losses) == 16
    assert sum(losses[8:]) < sum(losses[:8])


def test_the_first_loss_is_kl_and_cross_entropy_of_the_first_batch(run, tiny_model, pruned, tokens_to_heal):
    _, _, sent = run(distilling(tokens=4 * N, eval_every=1, ce_weight=0.5, learning_rate=1e-5))
    batch = tokens_to_heal.healing[distill._Windows(tokens_to_heal.healing, 4, 0).order]
    with torch.no_grad():
        p = load_whole(tiny_model)(batch).logits.log_softmax(-1)
        output = load_pruned(pruned)(batch, labels=batch)
    q = output.logits.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean() + 0.5 * output.loss
    assert sent[0][1]["heal.loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_micro_batches_do_not_change_the_result_by_more_than_rounding(run, monkeypatch):
    _, at_once, _ = run(distilling(tokens=8 * N, eval_every=2))
    monkeypatch.setattr(distill, "LOGITS_AT_ONCE", 2 * N * 400)
    _, in_parts, _ = run(distilling(tokens=8 * N, eval_every=2), name="parts")
    one, other = (load_file(d.path / "model.safetensors") for d in (at_once, in_parts))
    # AdamW's first steps are of the size of the learning rate, whatever the gradient: only few signs may differ
    differences = torch.cat([(one[n] - other[n]).abs().flatten() for n in one])
    assert differences.mean() < 1e-6


def test_windows_are_all_seen_before_any_is_seen_again():
    order = distill._Windows(few_tokens(5, 0), 12, seed=3).order
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10]
    assert (
        order
        == distill._Windows(few_tokens(5, 0), 12, seed=3).order
        != distill._Windows(few_tokens(5, 0), 12, seed=4).order
    )


def test_the_learning_rate_rises_and_falls():
    assert [round(schedule.rate(done, 0.2), 6) for done in (0.0, 0.1, 0.2, 0.6, 1.0, 1.2)] == [0, 0.5, 1, 0.5, 0, 0]
    assert schedule.rate(0.0, 0.0) == 1


class Killed(Exception):
    pass


@pytest.mark.parametrize(("kind", "after"), [("blocks", 2), ("lora", 1)])
def test_an_interrupted_run_continues_to_the_same_bytes(run, tmp_path, monkeypatch, kind, after):
    settings = distilling(trainable=kind, tokens=12 * 4 * N)
    _, straight, _ = run(settings)
    evaluate, evaluations = distill._Trainer.evaluate, []

    def killed(trainer, *args, **kwargs):
        if len(evaluations) == after:
            raise Killed
        evaluations.append(trainer.state.global_step)
        return evaluate(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(distill._Trainer, "evaluate", killed)
        with pytest.raises(Killed):
            run(settings, name="killed")
    (folder,) = (tmp_path / "work").iterdir()
    # As if it had been killed while it wrote a later one.
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / distill.STATE).write_text("{")
    _, resumed, sent = run(settings, name="resumed")
    assert min(step for step, _ in sent) == 4 * after + 1
    assert resumed.weights_sha256 == straight.weights_sha256
    assert not folder.exists()


def test_another_learning_rate_does_not_continue_an_interrupted_run(run, monkeypatch):
    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(distill._Trainer, "_save_rng_state", killed)
        with pytest.raises(Killed):
            run(distilling(), name="killed")
    _, _, sent = run(distilling(learning_rate=1e-3))
    assert sent[0][0] == 1


def test_training_ends_when_its_time_is_over_and_the_rate_falls_with_it(run):
    report, _, sent = run(distilling(minutes=1e-9, eval_every=100))
    assert report.n_tokens in (0, 4 * N)
    assert {step for step, _ in sent} == {1}


def test_training_ends_when_patience_does(run):
    report, _, sent = run(distilling(learning_rate=3.0, eval_every=1, patience=3))
    assert max(step for step, _ in sent) == 3
    assert report.changed == []


@pytest.mark.parametrize("kind", ["blocks", "lora"])
def test_a_loss_that_is_no_number_is_one_error_and_no_checkpoint(run, tmp_path, kind):
    with pytest.raises(RuntimeError, match=r"^the loss is nan in step \d+: lower heal.learning_rate$"):
        run(distilling(trainable=kind, learning_rate=1e30, warm_up=0.0, eval_every=100))
    assert list((tmp_path / "healed").iterdir()) == []


@pytest.mark.parametrize("method", [distilling, reconstructing])
def test_a_batch_smaller_than_a_window_is_refused(run, method):
    with pytest.raises(ValueError, match="heal.batch_tokens = 10 is less than a window of 24 tokens"):
        run(method(batch_tokens=10))


def test_fewer_tokens_than_one_step_are_refused(run):
    with pytest.raises(ValueError, match="heal.tokens = 95 is less than one step of 96: raise it, or"):
        run(distilling(tokens=95))


def test_lora_trains_what_peft_can_of_a_state_space_model(tmp_path, tokens):
    model_type, changes = HYBRIDS["mamba"]
    made = random_model(model_type, **changes)
    setattr(made.config, LAYOUT_KEY, find_layout(made).to_dict())
    made.save_pretrained(tmp_path / "whole")
    whole = ModelDirectory(tmp_path / "whole")
    (tmp_path / "pruned").mkdir()
    write_pruned(whole, [Sublayer(1, "attention")], tmp_path / "pruned", {}, "")
    # Judged by what it trains on, which any training lowers.
    task = Task(whole, ModelDirectory(tmp_path / "pruned"), tokens[:4], tokens[:4], tmp_path, lambda *_: None)
    healed = distill.heal(task, distilling(trainable="lora", learning_rate=0.01))
    assert healed.parameters
    assert not any(name.endswith(("conv1d.weight", "out_proj.weight")) for name in healed.parameters)


def test_windows_that_would_judge_themselves_are_refused_before_a_model_is_loaded(run, tokens_to_heal, monkeypatch):
    monkeypatch.setattr(distill, "load_pruned", lambda *_, **__: pytest.fail("loaded"))
    repeated = torch.cat([tokens_to_heal.healing, tokens_to_heal.held_out[1:3]])
    with pytest.raises(ValueError, match="2 of 66 windows to heal on are held-out windows too"):
        run(distilling(), tokens=dataclasses.replace(tokens_to_heal, healing=repeated))


def test_the_teacher_inside_lora_is_the_whole_model_before_and_after_training(tiny_model, pruned, tokens_to_heal):
    task = distill.Task(ModelDirectory(tiny_model), pruned, None, tokens_to_heal.held_out, None, None)
    pair = distill._lora(task, distilling(trainable="lora", learning_rate=5e-3), CPU, torch.float32)
    whole, other = load_whole(tiny_model), load_pruned(pruned)
    batch = tokens_to_heal.held_out
    with torch.no_grad():
        torch.testing.assert_close(pair.teacher(batch), whole(batch).logits)
        torch.testing.assert_close(logits_of(pair.student)(batch), other(batch).logits)
        trained = [p for p in pair.student.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(pair.teacher(batch), whole(batch).logits)
        assert all(p.requires_grad for p in trained)
        # Merged, they give what the student computes.
        for name, value in pair.parameters().items():
            other.get_parameter(name).data = value
        torch.testing.assert_close(logits_of(pair.student)(batch), other(batch).logits, rtol=1e-3, atol=1e-3)


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
    batch, held_out = few_tokens(32, 3), few_tokens(4, 4)
    whole, fitted = (random_model(model_type, **changes) for _ in range(2))
    with masked(fitted, removed):
        before = fidelity(logits_of(whole), logits_of(fitted), held_out)
    found = fit(fitted, batch, removed)
    assert any(FITTED[case] in name for name in found)
    with masked(fitted, removed):
        after = fidelity(logits_of(whole), logits_of(fitted), held_out)
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


def test_a_training_that_finds_nothing_better_leaves_the_refit(run):
    _, refitted, _ = run(refitting())
    _, trained, _ = run(reconstructing(learning_rate=3.0), name="trained")
    assert trained.weights_sha256 == refitted.weights_sha256


def test_a_reconstruction_whose_loss_is_no_number_is_one_error(run, tmp_path):
    with pytest.raises(RuntimeError, match=r"^reconstruct: the loss of 1.attention is (nan|inf) in step 2: lower heal"):
        run(reconstructing(learning_rate=1e30, warm_up=0.0))
    assert list((tmp_path / "healed").iterdir()) == []


@pytest.mark.parametrize("settings", [refitting(), reconstructing()], ids=["refit", "reconstruct"])
def test_an_interrupted_fit_continues_to_the_same_bytes(run, tmp_path, monkeypatch, settings):
    _, straight, told = run(settings)
    fit, fitted = refit.ClosedForm.__call__, []

    def killed(method, place):
        if len(fitted) == 2:
            raise Killed
        fitted.append(place.name)
        return fit(method, place)

    with monkeypatch.context() as patch:
        patch.setattr(refit.ClosedForm, "__call__", killed)
        with pytest.raises(Killed):
            run(settings, name="killed")
    assert fitted == ["1.attention", "2.mlp"]
    (folder,) = (tmp_path / "work").iterdir()
    _, resumed, sent = run(settings, name="resumed")
    assert sent == told[2:]
    assert resumed.weights_sha256 == straight.weights_sha256
    assert not folder.exists()


@pytest.mark.parametrize(("case", "trained"), [("gpt_neox", "attention.dense"), ("mixtral", "mlp.experts")])
def test_parallel_blocks_and_experts_are_reconstructed(case, trained):
    model_type, changes = CASES[case]
    removed = [Sublayer(1, "attention"), Sublayer(2, "mlp")]
    batch, held_out = few_tokens(32, 3), few_tokens(4, 4)
    whole, fitted = (random_model(model_type, **changes) for _ in range(2))
    stored = {name: p.detach().bfloat16() for name, p in fitted.named_parameters()}
    with masked(fitted, removed):
        before = fidelity(logits_of(whole), logits_of(fitted), held_out)
    found = reconstructed(fitted, batch, removed, stored.get)
    assert any(trained in name for name in found)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert all(torch.equal(fitted.get_parameter(name), value.float()) for name, value in found.items())
    assert not any(p.requires_grad for p in fitted.parameters() if p.grad is not None)
    with masked(fitted, removed):
        after = fidelity(logits_of(whole), logits_of(fitted), held_out)
    assert after.divergence < 0.95 * before.divergence


def test_params_choose_the_method(tmp_path):
    from pydantic import TypeAdapter, ValidationError

    kinds = TypeAdapter(Heal)
    assert kinds.validate_python({"method": "none"}).method == "none"
    for settings in (distilling(), refitting(), reconstructing()):
        assert kinds.validate_python(settings.model_dump()) == settings
    for wrong in ({"method": "none", "tokens": 1}, {"method": "pray"}, refitting().model_dump() | {"ridges": []}):
        with pytest.raises(ValidationError):
            kinds.validate_python(wrong)


def test_generation_settings_that_saving_refuses_do_not_stop_the_training(tiny_model, pruned, tokens_to_heal, tmp_path):
    whole, parent = (shutil.copytree(path, tmp_path / name) for path, name in ((tiny_model, "w"), (pruned.path, "p")))
    sampling = json.dumps({"bos_token_id": 0, "eos_token_id": 1, "temperature": 0.9, "top_p": 0.6})
    for directory in (whole, parent):
        (directory / "generation_config.json").write_text(sampling)
    inputs = Inputs(lambda: tokens_to_heal, None, ModelDirectory(whole), tmp_path / "work", lambda figures, step: None)
    (tmp_path / "healed").mkdir()
    heal.apply(ModelDirectory(parent), tmp_path / "healed", distilling(), inputs)
    assert (tmp_path / "healed/generation_config.json").read_text() == sampling


def test_a_model_whose_code_does_not_mix_dtypes_is_trained_in_one(tmp_path, tokens_to_heal, caplog):
    model_type, changes = OTHERS["dbrx"]
    random_model(model_type, **changes).save_pretrained(tmp_path / "whole")
    whole = ModelDirectory(tmp_path / "whole")
    prune.prune(whole, REMOVED, None, tmp_path / "pruned")
    inputs = Inputs(lambda: tokens_to_heal, None, whole, tmp_path / "work", lambda figures, step: None)
    (tmp_path / "healed").mkdir()
    report = heal.apply(ModelDirectory(tmp_path / "pruned"), tmp_path / "healed", distilling(dtype="bfloat16"), inputs)
    assert "trained in float32" in caplog.text
    assert report.divergence_after < report.divergence_before
