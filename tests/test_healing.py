"""The step `heal` and its methods on tiny random models."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil

import pytest
import torch
from conftest import few_tokens
from family_models import HYBRIDS, OTHERS, random_model
from healing_settings import N, distilling, reconstructing, refitting
from safetensors.torch import load_file, save_file

from finercut.checkpoint import heal, prune
from finercut.checkpoint.lineage import lineage_of
from finercut.checkpoint.settings import Heal
from finercut.checkpoint.steps import Inputs, Proof
from finercut.checkpoint.writing import differing_tensors, write_pruned
from finercut.healing import distill, schedule
from finercut.healing.fidelity import HeldOut, compare, logits_of
from finercut.healing.task import Task
from finercut.model.directory import ModelDirectory
from finercut.model.families import LAYOUT_KEY
from finercut.model.loading import load_pruned, load_whole
from finercut.model.probe import find_layout
from finercut.selection import refit
from finercut.selection.bench import Bench
from finercut.selection.divergence import js
from finercut.sublayers import Sublayer
from finercut.tokens import Tokens

pytestmark = pytest.mark.slow  # trains

REMOVED = ["1.mlp", "2.attention"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens_to_heal():
    return Tokens(
        calibration=few_tokens(4, 0),
        held_out=few_tokens(4, 1),
        healing=few_tokens(64, 2),
        held_out_sources=torch.tensor([0, 0, 0, 1]),
        sources=("prose", "chat"),
    )


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
    sources = tokens_to_heal.sources_of("held_out")
    return Proof(
        tokens_to_heal.held_out, 1e-3, CPU, whole=whole, report=tmp_path / "heal.json", held_out_sources=sources
    )


def in_blocks(names):
    return {name for name in names if name.startswith("model.layers.")}


# What all methods have in common


def test_fidelity_is_the_mean_js_over_sources_and_the_perplexity_of_the_text(tiny_model, pruned, tokens_to_heal):
    whole, other = load_whole(tiny_model), load_pruned(pruned)
    held_out = tokens_to_heal.held_out
    with torch.no_grad():
        of_windows = js(whole(held_out).logits, other(held_out).logits).mean(-1)
        surprise = other(held_out, labels=held_out).loss.item()
    of_sources, of_one_source = HeldOut(held_out, tokens_to_heal.sources_of("held_out")), HeldOut(held_out)
    for windows in (of_sources, of_one_source):
        windows.expect(logits_of(whole), CPU)
        windows.expect(lambda _: pytest.fail("computed once more"), CPU)
    found = of_sources.fidelity(logits_of(other), CPU)
    assert found.divergence == pytest.approx(((of_windows[:3].mean() + of_windows[3]) / 2).item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(surprise), rel=1e-5)
    divergence = of_one_source.fidelity(logits_of(other), CPU).divergence
    assert divergence == pytest.approx(of_windows.mean().item(), rel=1e-5)


@pytest.mark.parametrize("method", [distilling, refitting])
def test_healing_starts_at_the_held_out_divergence_that_the_search_ended_at(
    run, tiny_model, tokens_to_heal, method, caplog
):
    caplog.set_level(logging.INFO, "finercut")
    sources = tokens_to_heal.sources_of("held_out")
    windows = tokens_to_heal.calibration, tokens_to_heal.held_out
    with Bench(load_whole(tiny_model), *windows, held_out_sources=sources) as bench:
        bench.remove([Sublayer(1, "mlp"), Sublayer(2, "attention")])
        at_end = bench.held_out_divergence()
    report, _, _ = run(method())
    assert report.divergence_before == pytest.approx(at_end, rel=1e-4)
    assert f"heal: before, held-out divergence {at_end:.4f}" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [distilling(), distilling(trainable="lora", learning_rate=5e-3), refitting(), reconstructing()],
    ids=["distill", "lora", "refit", "reconstruct"],
)
def test_a_healed_checkpoint_is_closer_to_the_whole_model_and_its_claim_holds(
    run, pruned, tiny_model, tokens_to_heal, proof, settings
):
    report, healed, sent = run(settings)
    held_out, sources = tokens_to_heal.held_out, tokens_to_heal.sources_of("held_out")
    before, after = compare(ModelDirectory(tiny_model), [pruned, healed], held_out, sources, CPU)
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


@pytest.mark.parametrize("method", [distilling, refitting])
def test_what_was_healed_is_kept_until_it_is_written(run, tmp_path, monkeypatch, method, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(heal, "compare", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space"):
            run(method(), name="full")
    (folder,) = (tmp_path / "work").iterdir()
    caplog.set_level(logging.INFO, "finercut")
    run(method(), name="again")
    assert (
        "continues after step 16 of an interrupted run" in caplog.text or "was fitted by an interrupted" in caplog.text
    )
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
    pruned = ModelDirectory(tmp_path / "pruned")
    task = Task(whole, pruned, tokens[:4], HeldOut(tokens[:4]), CPU, torch.float32, tmp_path, lambda *_: None)
    healed = distill.heal(task, distilling(trainable="lora", learning_rate=0.01))
    assert healed.parameters
    assert not any(name.endswith(("conv1d.weight", "out_proj.weight")) for name in healed.parameters)


def test_windows_that_would_judge_themselves_are_refused_before_a_model_is_loaded(run, tokens_to_heal, monkeypatch):
    monkeypatch.setattr(distill, "load_pruned", lambda *_, **__: pytest.fail("loaded"))
    repeated = torch.cat([tokens_to_heal.healing, tokens_to_heal.held_out[1:3]])
    with pytest.raises(ValueError, match="2 of 66 windows to heal on are held-out windows too"):
        run(distilling(), tokens=dataclasses.replace(tokens_to_heal, healing=repeated))


def test_the_teacher_inside_lora_is_the_whole_model_before_and_after_training(tiny_model, pruned, tokens_to_heal):
    held_out = HeldOut(tokens_to_heal.held_out)
    task = distill.Task(ModelDirectory(tiny_model), pruned, None, held_out, CPU, torch.float32, None, None)
    pair = distill._lora(task, distilling(trainable="lora", learning_rate=5e-3))
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


# Fits along the depth


def test_a_training_that_finds_nothing_better_leaves_the_refit(run):
    _, refitted, _ = run(refitting())
    _, trained, _ = run(reconstructing(learning_rate=3.0), name="trained")
    assert trained.weights_sha256 == refitted.weights_sha256


def test_a_reconstruction_whose_loss_is_no_number_is_one_error(run, tmp_path):
    with pytest.raises(RuntimeError, match=r"^reconstruct: the loss of 1.attention is (nan|inf) in step 2: lower heal"):
        run(reconstructing(learning_rate=1e30, warm_up=0.0))
    assert list((tmp_path / "healed").iterdir()) == []


STARTING_FROM_REFIT = {"ridges": [0.01, 0.1, 1.0], "fractions": [0.5, 1.0]}


def test_distillation_can_start_from_a_refit(run, tokens_to_heal, caplog):
    caplog.set_level(logging.INFO, "finercut")
    by_refit, refitted, _ = run(refitting(batch_tokens=4 * N), name="refitted")
    caplog.clear()
    report, trained, _ = run(distilling(learning_rate=1e-4, **STARTING_FROM_REFIT), name="trained")
    assert f"heal: before, held-out divergence {by_refit.divergence_after:.4f}" in caplog.text
    assert report.divergence_after < by_refit.divergence_after
    n_fitted = tokens_to_heal.healing.numel()
    assert n_fitted < report.n_tokens <= n_fitted + 16 * 4 * N
    # What a training that finds nothing better leaves is the refit.
    untrained, same, _ = run(distilling(learning_rate=0.1, **STARTING_FROM_REFIT), name="untrained")
    assert same.weights_sha256 == refitted.weights_sha256 != trained.weights_sha256
    assert untrained.n_tokens == n_fitted


def test_windows_of_repeated_passages_are_trained_on_too(run, caplog):
    caplog.set_level(logging.INFO, "finercut")
    _, plain, _ = run(distilling(), name="plain")
    assert "passes over 64 windows" in caplog.text
    _, repeated, _ = run(distilling(repeated_share=0.2), name="repeated")
    assert "passes over 80 windows" in caplog.text
    assert repeated.weights_sha256 != plain.weights_sha256


def test_repeated_windows_have_passages_of_others_twice_in_a_row():
    rows = [[*range(20 * i, 20 * i + 13)] for i in range(1, 7)]
    twice = [row[:4] * 2 + row[4:8] + row[4:5] for row in rows]
    with_bos = torch.tensor([[1, *row] for row in rows])
    found = schedule.with_repeated(with_bos, 1 / 3, 0)
    assert torch.equal(found[:6], with_bos)
    chosen = [[1, *row] for row in twice]
    assert len({chosen.index(row) for row in found[6:].tolist()}) == 3
    without = torch.tensor(rows)
    (row,) = schedule.with_repeated(without, 0.15, 1)[6:].tolist()
    assert row in twice
    for windows, share in ((without, 0.0), (without[:, :11], 0.5), (without[:1], 0.3)):  # none, too short, too few
        assert torch.equal(schedule.with_repeated(windows, share, 0), windows)


def test_repeated_windows_are_of_every_source_where_sources_take_turns():
    windows = torch.arange(96)[:, None] * 100 + torch.arange(24)
    found = schedule.with_repeated(windows, 0.2, 0)[96:]
    assert {int(row[0]) // 100 % 4 for row in found} == {0, 1, 2, 3}


def test_an_interrupted_training_does_not_fit_its_start_again(run, monkeypatch):
    _, straight, _ = run(distilling(**STARTING_FROM_REFIT))
    with monkeypatch.context() as patch:
        patch.setattr(distill, "_trainer", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run(distilling(**STARTING_FROM_REFIT), name="killed")
    monkeypatch.setattr(refit.ClosedForm, "__call__", lambda *_: pytest.fail("fitted again"))
    _, resumed, _ = run(distilling(**STARTING_FROM_REFIT), name="resumed")
    assert resumed.weights_sha256 == straight.weights_sha256


@pytest.mark.parametrize("what", ["lora", "one window"])
def test_where_nothing_can_be_refitted_training_starts_from_the_pruned_model(run, tokens_to_heal, what, caplog):
    caplog.set_level(logging.INFO, "finercut")
    lora = {"trainable": "lora", "learning_rate": 5e-3} if what == "lora" else {}
    tokens = tokens_to_heal if lora else dataclasses.replace(tokens_to_heal, healing=tokens_to_heal.healing[:1])
    with_ridges, healed, _ = run(distilling(**lora, **STARTING_FROM_REFIT), tokens=tokens)
    assert "nothing is refitted first" in caplog.text
    without, same, _ = run(distilling(**lora), name="without", tokens=tokens)
    assert healed.weights_sha256 == same.weights_sha256
    assert with_ridges.n_tokens == without.n_tokens


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
