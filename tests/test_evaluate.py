"""The stages `evaluate_whole` and `evaluate`, run in a project directory on the tiny model."""

import contextlib
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_llama
from safetensors.torch import load_file, save_file

from finercut.checkpoint.writing import write_pruned
from finercut.evaluation import harness
from finercut.evaluation.records import EvaluateReport, Measured
from finercut.sublayers import parse
from finercut.tokens import Tokens, repetition, write_tokens
from pipelines import evaluate, evaluate_whole, params, paths

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
        "samples": {"prompts": ["The river rises in", "Coffee"], "n_tokens": 8},
        "alone_tokens": 8,
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
    shutil.copytree(paths.PRUNED, paths.FINAL)
    return tmp_path


def both(chosen) -> EvaluateReport:
    evaluate_whole.run(chosen)
    return evaluate.run(chosen)


def test_both_models_are_measured_on_the_same_tasks_and_held_out_tokens(project, tokens, caplog):
    with caplog.at_level(logging.INFO, logger="finercut"):
        report = both(settings())
    assert EvaluateReport.read(paths.report("evaluate")) == report

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


def test_what_the_models_write_after_the_prompts_is_what_each_prompt_alone_gives(project, tokenizer):
    report = both(settings(tasks=[]))
    whole = Measured.read(paths.report("evaluate_whole"))
    model = random_llama()
    for sample in whole.samples:
        prompt = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
        alone = model.generate(prompt, do_sample=False, max_new_tokens=8)[0, prompt.shape[1] :]
        assert sample.text == tokenizer.decode(alone, skip_special_tokens=True)
        assert sample.n_tokens == len(alone)
        assert sample.repetition == repetition(alone.tolist())
    assert [sample.prompt for sample in report.samples] == ["The river rises in", "Coffee"]
    assert [sample.text for sample in report.samples] != [sample.text for sample in whole.samples]
    assert [figures.sublayer for figures in whole.sublayers][:2] == ["0.attention", "0.mlp"]
    assert report.unhealed is None


def test_prompts_beyond_the_context_are_refused_before_the_model_is_read(project):
    (paths.MODEL / "model.safetensors").unlink()
    long = {"prompts": ["The river", "rises in the mountains"], "n_tokens": 255}
    with pytest.raises(ValueError, match=r"evaluate.samples: .* are 2\d\d tokens, the model's context has 256: lower"):
        evaluate_whole.run(settings(tasks=[], samples=long))


def test_the_same_models_give_the_same_bytes(project):
    quick = settings(tasks=[{"name": "finercut_agreement", "metric": "acc", "limit": 4}])
    both(quick)
    files = [paths.report("evaluate_whole"), paths.report("evaluate")]
    first = [file.read_bytes() for file in files]
    both(quick)
    assert [file.read_bytes() for file in files] == first


def test_the_whole_model_is_measured_once_for_all_that_is_compared_with_it(project):
    quick = settings(tasks=[{"name": "finercut_agreement", "metric": "acc", "limit": 4}])
    measured = evaluate_whole.run(quick)
    assert Measured.read(paths.report("evaluate_whole")) == measured
    shutil.rmtree(paths.MODEL)  # another budget needs no whole model
    report = evaluate.run(quick)
    assert report.whole_perplexity == measured.perplexity
    assert report.tasks["finercut_agreement"].whole == measured.tasks["finercut_agreement"].value


def test_what_healing_changed_is_measured_before_it_too(project):
    quick = settings(tasks=[{"name": "finercut_agreement", "metric": "acc", "limit": 4}])
    before = both(quick)
    assert before.unhealed is None
    file = paths.FINAL / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(weights, file, {"format": "pt"})
    report = evaluate.run(quick)
    assert report.unhealed.perplexity == before.pruned_perplexity != report.pruned_perplexity
    assert report.unhealed.tasks["finercut_agreement"].value == before.tasks["finercut_agreement"].pruned
    off = quick.evaluate.model_copy(update={"unhealed": False})
    assert evaluate.run(quick.model_copy(update={"evaluate": off})).unhealed is None


def test_figures_of_other_tasks_are_not_compared(project):
    evaluate_whole.run(settings(tasks=[]))
    with pytest.raises(ValueError, match="measured on other tasks or tokens: run `finercut evaluate_whole`"):
        evaluate.run(settings(tasks=[{"name": "finercut_agreement", "metric": "acc", "limit": 4}]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": [{"name": "finercut_agreement", "metric": "acc", "limit": 5}]}, "on other tasks or tokens"),
        ({"seed": 7}, "on other tasks or tokens"),
        ({"dtype": "bfloat16"}, "in float32"),
    ],
)
def test_figures_that_were_asked_for_otherwise_are_not_compared(project, changes, said):
    one = {"tasks": [{"name": "finercut_agreement", "metric": "acc", "limit": 4}]}
    evaluate_whole.run(settings(**one))
    with pytest.raises(ValueError, match=f"was measured {said}: run `finercut evaluate_whole`"):
        evaluate.run(settings(**one | changes))


def test_figures_of_another_model_are_not_compared(project):
    quick = settings(tasks=[])
    whole = evaluate_whole.run(quick)
    file = paths.FINAL / "config.json"
    content = json.loads(file.read_text())
    content["finercut"]["whole_sha256"] = whole.sha256
    file.write_text(json.dumps(content))
    evaluate.run(quick)
    content["finercut"]["whole_sha256"] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was measured on another model: run `finercut evaluate_whole`"):
        evaluate.run(quick)


def test_a_wrong_task_is_refused_before_a_model_is_read(project):
    (paths.MODEL / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no smoke task 'finercut_agrement'"):
        evaluate_whole.run(settings(tasks=[{"name": "finercut_agrement", "metric": "acc"}]))


def test_without_tasks_perplexity_is_still_measured(project):
    report = both(settings(tasks=[]))
    assert report.tasks == {}
    assert report.mean_retention is None
    assert report.note == "No tasks were evaluated."
    assert report.pruned_perplexity > 0


@pytest.mark.parametrize(("missing", "stage"), [(paths.MODEL, "fetch"), (paths.FINAL, "quantise")])
def test_a_missing_model_names_the_stage_that_makes_it(project, missing, stage):
    shutil.rmtree(missing)
    with pytest.raises(FileNotFoundError, match=f"run `finercut {stage}` first"):
        both(settings(tasks=[]))


def test_lm_evals_warnings_reach_the_log_and_its_bars_do_not(caplog):
    with contextlib.closing(harness._WithoutBars()) as stream, caplog.at_level(logging.WARNING, logger="finercut"):
        print("50%|#####     |\r100%|##########|", file=stream)
        print("tokenizer has no BOS", file=stream)
        stream.write("cut ")
        stream.flush()
        stream.write("off")
    assert [record.getMessage() for record in caplog.records] == ["lm-eval: tokenizer has no BOS", "lm-eval: cut off"]


def test_lm_evals_warnings_reach_a_program_that_has_set_up_no_log(monkeypatch, capsys):
    # Python then writes warnings to what sys.stderr is at that moment, which is where they come from.
    monkeypatch.setattr(logging.root, "handlers", [])
    with contextlib.closing(harness._WithoutBars()) as stream, contextlib.redirect_stderr(stream):
        print("tokenizer has no BOS", file=sys.stderr)
    assert capsys.readouterr().err == "lm-eval: tokenizer has no BOS\n"
