"""The stage `evaluate`, run in a project directory on the tiny model."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_llama

from finercut.checkpoint.records import ParityReport
from finercut.evaluation.records import EvaluateReport
from finercut.model.loading import write_pruned
from finercut.sublayers import parse
from finercut.tokens import Tokens, write_tokens
from pipelines import evaluate, params, paths

ROOT = Path(__file__).parent.parent
REMOVED = [parse("1.mlp").sublayers[0], parse("2.attention").sublayers[0]]


def settings(**changes) -> params.Params:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["evaluate"] |= {
        "tasks": [
            {"name": "finercut_agreement", "metric": "acc", "limit": 40},
            {"name": "finercut_copying", "metric": "exact_match", "limit": 2},
        ],
        "dtype": "float32",
        "device": "cpu",
    }
    values["evaluate"] |= changes
    return params.Params.model_validate(values)


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_model, tokens):
    """A directory in which everything before has run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, paths.MODEL)
    paths.CALIBRATION.mkdir()
    write_tokens(paths.CALIBRATION, Tokens(tokens[:4], tokens[4:]), {})
    write_pruned(paths.MODEL, REMOVED, paths.PRUNED, {}, "")
    return tmp_path


def test_both_models_are_measured_on_the_same_tasks_and_held_out_tokens(project, tokens, caplog):
    with caplog.at_level(logging.INFO, logger="finercut"):
        report = evaluate.run(settings())
    assert EvaluateReport.read(paths.report("evaluate")) == report
    assert ParityReport.read(paths.PARITY).passed

    with torch.no_grad():
        whole = random_llama()
        assert report.whole_perplexity == pytest.approx(
            whole(tokens[4:], labels=tokens[4:]).loss.exp().item(), rel=1e-4
        )
        whole.model.layers[1].mlp.down_proj.weight.zero_()
        whole.model.layers[2].self_attn.o_proj.weight.zero_()
        pruned_perplexity = whole(tokens[4:], labels=tokens[4:]).loss.exp().item()
    assert report.pruned_perplexity == pytest.approx(pruned_perplexity, rel=1e-4)
    assert report.perplexity_ratio == report.pruned_perplexity / report.whole_perplexity

    agreement, copying = report.tasks["finercut_agreement"], report.tasks["finercut_copying"]
    assert (agreement.n_samples, copying.n_samples) == (40, 2)
    assert agreement.retention == agreement.pruned / agreement.whole
    # A random model copies nothing, so there is nothing to retain.
    assert (copying.whole, copying.retention) == (0, None)
    assert report.mean_retention == agreement.retention
    assert (agreement.generative, copying.generative) == (False, True)
    assert "smoke tasks, not published benchmarks" in report.note
    assert "evaluate: pruned model, finercut_agreement" in caplog.text


def test_the_same_models_give_the_same_bytes(project):
    quick = settings(tasks=[{"name": "finercut_agreement", "metric": "acc", "limit": 4}])
    evaluate.run(quick)
    files = [paths.PARITY, paths.report("evaluate")]
    first = [file.read_bytes() for file in files]
    evaluate.run(quick)
    assert [file.read_bytes() for file in files] == first


def test_nothing_goes_on_when_the_checkpoint_is_not_the_masked_model(project):
    paths.report("evaluate").parent.mkdir()
    paths.report("evaluate").write_text("of an earlier checkpoint")
    damaged = random_llama(hidden_act="gelu")
    shutil.rmtree(paths.PRUNED)
    damaged.save_pretrained("damaged")
    write_pruned(Path("damaged"), REMOVED, paths.PRUNED, {}, "")

    with pytest.raises(RuntimeError, match=r"does not compute what .* allowed 0\.001; nothing was evaluated"):
        evaluate.run(settings())
    parity = ParityReport.read(paths.PARITY)
    assert not parity.passed
    assert parity.max_logit_difference > 0.001
    assert not paths.report("evaluate").exists()


def test_a_wrong_task_is_refused_before_a_model_is_read(project):
    (paths.MODEL / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no smoke task 'finercut_agrement'"):
        evaluate.run(settings(tasks=[{"name": "finercut_agrement", "metric": "acc"}]))
    assert not paths.PARITY.exists()


def test_without_tasks_perplexity_is_still_measured(project):
    report = evaluate.run(settings(tasks=[]))
    assert report.tasks == {}
    assert report.mean_retention is None
    assert report.note == "No tasks were evaluated."
    assert report.pruned_perplexity > 0


@pytest.mark.parametrize(("missing", "stage"), [(paths.MODEL, "fetch"), (paths.PRUNED, "prune")])
def test_a_missing_model_names_the_stage_that_makes_it(project, missing, stage):
    shutil.rmtree(missing)
    with pytest.raises(FileNotFoundError, match=f"run `finercut {stage}` first"):
        evaluate.run(settings())
