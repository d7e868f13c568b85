"""What computes, on a GPU: the same results as on the CPU, in float32."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from bad_input import VALID
from conftest import few_tokens

from finercut.checkpoint.records import HealReport
from finercut.evaluation.records import EvaluateReport
from finercut.model.loading import load_whole
from finercut.model.masking import masked
from finercut.model.streaming import stream
from finercut.model.tensors import weights_sha256
from finercut.selection.divergence import js
from finercut.selection.greedy import search
from finercut.selection.trajectory import read_trajectory
from finercut.sublayers import parse
from finercut.tokens import Tokens, write_tokens
from pipelines import evaluate, evaluate_whole, params, paths, prune, steps
from pipelines import fetch as fetch_stage
from pipelines import search as search_stage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

REFIT = {"method": "refit", "ridges": [0.01, 0.1, 1.0], "fractions": [0.5, 1.0], "batch_tokens": 192}
RECONSTRUCT = {"method": "reconstruct", "sublayers": "all", "ridges": [0.1], "steps": 20, "warm_up": 0.1}
RECONSTRUCT |= {"batch_tokens": 192, "learning_rate": 3e-3, "eval_every": 5, "fractions": [0.5, 1.0], "seed": 0}
DISTILL = {"method": "distill", "trainable": "blocks", "lora_rank": 8, "tokens": 12288, "minutes": None, "warm_up": 0.1}
DISTILL |= {"batch_tokens": 96, "learning_rate": 3e-4, "ce_weight": 0.0, "eval_every": 4, "patience": None, "seed": 0}


def of_trajectory(found):
    return [(r.sublayer, pytest.approx(r.divergence, rel=1e-3, abs=1e-6)) for r in found]


@pytest.mark.parametrize("mode", ["exact", "lazy", "racing"])
def test_a_search_removes_what_the_cpus_removes(tiny_model, tokens, mode):
    on_cpu, on_gpu = (
        list(search(load_whole(tiny_model, torch.float32, d), tokens[:4].to(d), tokens[4:].to(d), 5, mode=mode))
        for d in ("cpu", "cuda")
    )
    assert [(r.sublayer, r.divergence) for r in on_gpu] == of_trajectory(on_cpu)
    assert [r.held_out_divergence for r in on_gpu] == pytest.approx(
        [r.held_out_divergence for r in on_cpu], rel=1e-3, abs=1e-6
    )


def test_a_search_in_bfloat16_gives_the_divergence_of_a_masked_bfloat16_model(tiny_model, tokens):
    model = load_whole(tiny_model, torch.bfloat16, "cuda")
    windows = tokens.cuda()
    found = list(search(model, windows[:4], windows[4:], 3, mode="exact"))
    with torch.inference_mode():
        whole = model(windows[:4]).logits.float()
        with masked(model, [s for r in found for s in parse(str(r.sublayer)).sublayers]):
            pruned = model(windows[:4]).logits.float()
    assert found[-1].divergence == pytest.approx(js(whole, pruned).mean().item(), rel=0.03)


def test_a_streamed_search_gives_the_resident_searchs_numbers(tiny_model, tokens):
    resident, streamed = load_whole(tiny_model, torch.float32, "cuda"), load_whole(tiny_model, torch.float32)
    layers = streamed.model.layers
    largest = max(sum(p.nbytes for p in layer.mlp.parameters()) for layer in layers)
    inside = sum(p.nbytes for layer in layers for core in (layer.self_attn, layer.mlp) for p in core.parameters())
    allowed = sum(p.nbytes for p in streamed.parameters()) - inside + 2 * largest
    stream(streamed, torch.device("cuda"), allowed)
    windows = tokens.cuda()
    expected = list(search(resident, windows[:4], windows[4:], 5, mode="exact"))
    found = list(search(streamed, windows[:4], windows[4:], 5, mode="exact"))
    assert [(r.sublayer, r.divergence) for r in found] == of_trajectory(expected)


@pytest.fixture
def compress(tmp_path, tiny_model, monkeypatch, without_vllm):
    """Runs the stages from fetch to evaluate on a device."""

    def run(device, heal):
        root = tmp_path / device
        root.mkdir()
        shutil.copytree(tiny_model, root / "mine")
        values = copy.deepcopy(VALID)
        values["fetch"]["source"] = {"kind": "local", "path": "mine"}
        values["calibrate"]["n_tokens"] = few_tokens(1, 0).shape[1]
        values["search"] |= {"dtype": "float32", "device": device, "continuation_tokens": 4}
        values["prune"]["budget"] = {"unit": "sublayers", "amount": 2}
        values["heal"] = heal | {"dtype": "float32", "device": device}
        tasks = [{"name": "finercut_agreement", "metric": "acc", "limit": 40}]
        values["evaluate"] |= {"tasks": tasks, "dtype": "float32", "device": device, "alone_tokens": 8}
        values["evaluate"]["samples"] = {"prompts": ["The river rises in"], "n_tokens": 8}
        chosen = params.Params.model_validate(values)
        monkeypatch.chdir(root)
        paths.REPORTS.mkdir()
        fetch_stage.run(chosen)
        paths.CALIBRATION.mkdir()
        write_tokens(paths.CALIBRATION, Tokens(few_tokens(4, 0), few_tokens(4, 1), few_tokens(64, 2)), {})
        search_stage.run(chosen)
        prune.run(chosen)
        for step in ("heal", "quantise"):
            steps.run_and_report(step, chosen)
        evaluate_whole.run(chosen)
        evaluate.run(chosen)
        return root

    return run


@pytest.mark.parametrize("heal", [REFIT, RECONSTRUCT, DISTILL], ids=lambda heal: heal["method"])
def test_the_stages_give_what_the_cpus_give(compress, heal):
    cpu, gpu = (compress(device, heal) for device in ("cpu", "cuda"))
    expected, found = (read_trajectory(root / paths.TRAJECTORY).removals for root in (cpu, gpu))
    assert [(r.sublayer, r.divergence) for r in found] == of_trajectory(expected)
    assert weights_sha256(gpu / paths.PRUNED) == weights_sha256(cpu / paths.PRUNED)
    expected, found = (HealReport.read(root / paths.report("heal")) for root in (cpu, gpu))
    assert found.divergence_after == pytest.approx(expected.divergence_after, rel=0.02)
    assert found.divergence_after < found.divergence_before
    expected, found = (EvaluateReport.read(root / paths.report("evaluate")) for root in (cpu, gpu))
    assert found.whole_perplexity == pytest.approx(expected.whole_perplexity, rel=1e-3)
    assert found.pruned_perplexity == pytest.approx(expected.pruned_perplexity, rel=0.02)
    assert found.tasks["finercut_agreement"].whole == pytest.approx(expected.tasks["finercut_agreement"].whole, abs=0.1)
