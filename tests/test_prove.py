"""The stages `heal` and `prove` on the tiny model; what vLLM claims is in test_serving."""

import json
import logging
import shutil

import pytest
import torch
from conftest import random_llama
from safetensors.torch import load_file, save_file

from finercut.checkpoint import heal, lineage, prune
from finercut.checkpoint.records import HealReport
from finercut.checkpoint.steps import Proof, link_files, step
from finercut.checkpoint.writing import write_pruned
from finercut.model.directory import ModelDirectory
from finercut.selection.settings import Budget
from finercut.sublayers import Sublayer
from pipelines import params, paths, steps

PROOF_TOLERANCE = 1e-3


@pytest.fixture
def proof(tokens):
    return Proof(held_out=tokens[4:], logit_tolerance=PROOF_TOLERANCE, device=torch.device("cpu"))


@pytest.fixture
def pruned(tiny_model, tmp_path):
    report = prune.prune(tiny_model, ["2.attention", "3.mlp"], None, tmp_path / "pruned")
    assert report.removed == ["2.attention", "3.mlp"]
    return ModelDirectory(tmp_path / "pruned")


def test_prune_takes_names_and_writes_nothing_but_its_directory(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths.REPORTS.mkdir()
    paths.report("prune").write_text("of another checkpoint")
    prune.prune(str(tiny_model), [Sublayer(1, "mlp"), "2.block"], None, "pruned")
    assert paths.report("prune").read_text() == "of another checkpoint"
    assert {p.name for p in tmp_path.iterdir()} == {"pruned", "reports"}
    assert list(map(str, ModelDirectory("pruned").removed)) == ["1.mlp", "2.attention", "2.mlp"]


def test_prune_cuts_a_list_at_a_budget(tiny_model, tmp_path):
    report = prune.prune(tiny_model, ["3.mlp", "2.mlp"], Budget(unit="sublayers", amount=1), tmp_path / "pruned")
    assert (report.removed, report.method) == (["3.mlp"], "given")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["7.mlp"], "cannot remove 7.mlp: the model has "),
        (["mlp"], "is not a sublayer"),
        ([], "nothing to rem"),
    ],
)
def test_prune_refuses_what_the_model_does_not_have(tiny_model, tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        prune.prune(tiny_model, names, None, tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


def test_the_lineage_says_which_step_made_it_from_what(pruned, tiny_model):
    (made,) = lineage.lineage_of(pruned)
    assert (made.step, made.parent_sha256) == ("prune", ModelDirectory(tiny_model).weights_sha256)
    assert made.settings == {"method": "given", "budget": None}
    lineage.append(pruned, lineage.entry("polish", pruned, {"strength": 2}))
    assert [s.step for s in lineage.lineage_of(ModelDirectory(pruned.path))] == ["prune", "polish"]


def test_a_checkpoint_of_version_0_1_has_no_lineage(tiny_model, tmp_path):
    write_pruned(tiny_model, [Sublayer(3, "mlp")], tmp_path / "old", {"version": "0.1.0"}, "")
    assert lineage.lineage_of(ModelDirectory(tmp_path / "old")) == []


def test_prune_claims_that_it_is_the_masked_whole_model(pruned, tiny_model, proof):
    claim = step("prune").claim(ModelDirectory(tiny_model), pruned, proof)
    assert claim.holds
    assert claim.figures["max_logit_difference"] <= PROOF_TOLERANCE
    assert claim.figures["n_tokens"] == proof.held_out.numel()


def test_prunes_claim_does_not_hold_for_a_checkpoint_of_another_model(tiny_model, tmp_path, tokenizer, proof):
    random_llama(hidden_act="gelu").save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    prune.prune(tmp_path / "other", ["2.attention"], None, tmp_path / "pruned")
    claim = prune.claim(ModelDirectory(tiny_model), ModelDirectory(tmp_path / "pruned"), proof)
    assert not claim.holds
    assert claim.figures["max_logit_difference"] > PROOF_TOLERANCE


def test_healing_by_none_takes_no_second_copy(workspace):
    steps.run_and_report("heal", params.load())
    for file in paths.PRUNED.iterdir():
        assert (paths.HEALED / file.name).samefile(file)
    report = HealReport.read(paths.report("heal"))
    assert report == HealReport(method="none", changed=[], sha256=ModelDirectory(paths.PRUNED).weights_sha256)


def test_files_are_copied_where_the_disk_has_no_links(workspace, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "copy").mkdir()
    link_files(paths.PRUNED, tmp_path / "copy")
    assert (tmp_path / "copy/config.json").read_bytes() == (paths.PRUNED / "config.json").read_bytes()
    assert not (tmp_path / "copy/config.json").samefile(paths.PRUNED / "config.json")


@pytest.mark.parametrize("what", ["weights", "config"])
def test_heals_claim_does_not_hold_where_something_changed(workspace, proof, what):
    parent, child = ModelDirectory(paths.PRUNED), paths.HEALED
    assert heal.claim(parent, ModelDirectory(child), proof).holds
    shutil.rmtree(child)
    shutil.copytree(paths.PRUNED, child)
    if what == "weights":
        tensors = load_file(child / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, child / "model.safetensors", {"format": "pt"})
    else:
        config = json.loads((child / "config.json").read_text())
        (child / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    assert not heal.claim(parent, ModelDirectory(child), proof).holds


def test_a_step_that_nobody_wrote_is_named():
    with pytest.raises(ValueError, match=r"no step 'polish' on checkpoints: finercut/checkpoint/polish.py is missing"):
        step("polish")


def test_a_step_without_its_parent_names_the_stage_before(tmp_path, monkeypatch):
    chosen = params.load()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="run `finercut prune` first"):
        steps.run_and_report("heal", chosen)


def test_the_log_says_where_a_step_wrote(workspace, caplog):
    with caplog.at_level(logging.INFO, logger="finercut"):
        steps.run_and_report("heal", params.load())
    assert "heal: artifacts/healed" in caplog.text
