"""The stages `search` and `prune`, run in a project directory on the tiny model."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_llama
from safetensors.torch import load_file

from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.model.tensors import weights_bytes, weights_sha256
from finercut.selection.trajectory import read_trajectory
from finercut.sources.records import FetchReport
from finercut.sublayers import parse
from finercut.tokens import Tokens, write_tokens
from pipelines import params, paths, prune, search

ROOT = Path(__file__).parent.parent


def settings(**changes) -> params.Params:
    """The project's params with dotted changes, for the tiny model."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, value in ({"search.dtype": "float32", "search.device": "cpu", "search.removals": 5} | changes).items():
        section, key = name.split(".")
        values[section][key] = value
    return params.Params.model_validate(values)


def with_changes(**changes):
    return settings(**{name.replace("__", "."): value for name, value in changes.items()})


def _fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_model, tokens):
    """A directory in which fetch and calibrate have run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, paths.MODEL)
    write_tokens(_fresh(paths.CALIBRATION), Tokens(tokens[:4], tokens[4:]), {})
    FetchReport(
        source="tiny",
        revision="1",
        sha256=weights_sha256(paths.MODEL),
        model_type="llama",
        n_blocks=4,
        n_parameters=543_872,
        weights_bytes=1,
        dtype="float32",
        vocab_size=400,
        max_position_embeddings=256,
    ).write(paths.report("fetch"))
    return tmp_path


def test_the_reports_say_what_the_trajectory_holds(project):
    report = search.run(settings())
    found = read_trajectory(paths.TRAJECTORY)
    assert report.removals == [r.sublayer for r in found.removals]
    assert report.n_removals == 5
    assert report.n_candidates == 8
    assert report.final_divergence == found.removals[-1].divergence
    assert report.sublayer_passes == sum(r.sublayer_passes for r in found.removals) < report.brute_force_sublayer_passes
    assert report.curves_part == (report.final_held_out_divergence > 1.5 * report.final_divergence)
    with paths.CURVE.open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["held_out_divergence"]) for row in rows] == [r.held_out_divergence for r in found.removals]
    assert paths.CURVE_PICTURE.read_bytes().startswith(b"\x89PNG")
    assert json.loads(paths.report("search").read_text()) == report.model_dump()


def test_a_search_from_scratch_gives_the_same_bytes(project):
    search.run(settings())
    first = paths.TRAJECTORY.read_bytes()
    shutil.rmtree(paths.WORK)
    search.run(settings())
    assert paths.TRAJECTORY.read_bytes() == first


def test_a_longer_search_continues_a_shorter_one(project):
    search.run(with_changes(search__removals=2))
    report = search.run(settings())
    assert report.resumed_after == 2
    longer = paths.TRAJECTORY.read_bytes()
    assert search.run(with_changes(search__removals=2)).resumed_after == 2
    assert longer.startswith(paths.TRAJECTORY.read_bytes())
    shutil.rmtree(paths.WORK)
    search.run(settings())
    assert paths.TRAJECTORY.read_bytes() == longer


# Slow enough to be killed between two removals.
KILLED = """
import sys, time, yaml
from pipelines import params
from finercut.selection import trajectory
from pipelines import search
append = trajectory.append
def slow_append(path, removal):
    append(path, removal)
    print(removal.step, flush=True)
    time.sleep(0.3)
search.trajectory.append = slow_append
search.run(params.Params.model_validate(yaml.safe_load(sys.stdin)))
"""


@pytest.mark.parametrize("mode", ["exact", "lazy", "racing"])
def test_a_search_cut_anywhere_continues_to_the_same_bytes(project, mode):
    chosen = with_changes(search__mode=mode)
    search.run(chosen)
    undisturbed = paths.TRAJECTORY.read_bytes()
    lines = undisturbed.splitlines(keepends=True)
    assert read_trajectory(paths.TRAJECTORY).provenance.mode == mode
    (in_progress,) = paths.WORK.rglob(paths.TRAJECTORY.name)
    for n_whole, n_torn in ((0, 40), (1, 0), (2, 100), (4, 1)):
        in_progress.write_bytes(b"".join(lines[:n_whole]) + lines[n_whole][:n_torn])
        assert search.run(chosen).resumed_after == max(0, n_whole - 1)
        assert paths.TRAJECTORY.read_bytes() == undisturbed


def test_modes_do_not_continue_each_other_and_the_report_says_what_was_taken_on_trust(project):
    exact = search.run(settings())
    lazy = search.run(with_changes(search__mode="lazy"))
    assert lazy.resumed_after == 0
    assert lazy.removals == exact.removals
    assert (exact.mode, exact.least_margin, exact.error_probability) == ("exact", None, 0)
    assert lazy.mode == "lazy"
    margins = [r.margin for r in read_trajectory(paths.TRAJECTORY).removals if r.margin is not None]
    assert lazy.least_margin == min(margins)
    assert lazy.evaluations < exact.evaluations


def test_a_streamed_lazy_search_takes_all_windows_at_once_and_finds_the_same(project):
    provenance, removals = {}, {}
    for weights_gib, mode in ((None, "lazy"), (0.0015, "lazy"), (0.0015, "exact"), (1.0, "lazy")):
        removals[weights_gib, mode] = search.run(
            with_changes(search__mode=mode, search__weights_gib=weights_gib)
        ).removals
        provenance[weights_gib, mode] = read_trajectory(paths.TRAJECTORY).provenance
    assert [each.first_windows for each in provenance.values()] == [1, 4, 1, 1]
    assert len(set(map(tuple, removals.values()))) == 1


def test_a_killed_search_continues_to_the_same_bytes(project):
    chosen = settings()
    text = yaml.safe_dump(chosen.model_dump(mode="json", by_alias=True))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=project
    )
    process.stdin.write(text)
    process.stdin.close()
    while process.stdout.readline().strip() != "2":
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not paths.TRAJECTORY.exists()
    assert not paths.report("search").exists()
    assert search.run(chosen).resumed_after == 2
    continued = paths.TRAJECTORY.read_bytes()
    shutil.rmtree(paths.WORK)
    search.run(chosen)
    assert paths.TRAJECTORY.read_bytes() == continued


def test_divergence_on_held_out_tokens_far_above_the_calibrations_is_warned_of(project, tokens, caplog):
    write_tokens(_fresh(paths.CALIBRATION), Tokens(tokens[:1, :2].clone(), tokens[1:, :2].contiguous()), {})
    report = search.run(with_changes(search__removals=2))
    assert report.final_held_out_divergence > 1.5 * report.final_divergence, "two tokens are easy to overfit"
    assert report.curves_part
    assert "the removals fit the calibration set" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search__removals": 9}, "cannot remove 9 of 8 candidates"),
        ({"search__removals": 0.1}, "cannot remove 0 of 8 candidates"),
        ({"search__protect": ["7.mlp"]}, "blocks 0 to 3"),
        ({"search__device": "abacus"}, "no device 'abacus'"),
    ],
)
def test_bad_settings_are_one_error_and_nothing_is_written(project, changes, message):
    with pytest.raises(ValueError, match=message):
        search.run(with_changes(**changes))
    assert not paths.TRAJECTORY.exists()
    assert not paths.report("search").exists()


def test_stages_say_which_stage_is_missing(tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    for stage in (search, prune):
        with pytest.raises(FileNotFoundError, match="run `finercut fetch` first"):
            stage.run(settings())
    shutil.copytree(tiny_model, paths.MODEL)
    with pytest.raises(FileNotFoundError, match="run `finercut search` first"):
        prune.run(settings())


def test_prune_cuts_the_trajectory_at_the_budget(project, tokens):
    search.run(settings())
    found = read_trajectory(paths.TRAJECTORY)
    for budget, n_removals in (({"unit": "sublayers", "amount": 0.5}, 4), ({"unit": "sublayers", "amount": 2}, 2)):
        report = prune.run(with_changes(prune__budget=budget))
        removed = [s for r in found.removals[:n_removals] for s in parse(r.sublayer).sublayers]
        assert report.removed == [str(s) for s in removed]
        assert report.shares["sublayers"] == n_removals / 8
        assert report.divergence == found.removals[n_removals - 1].divergence
        whole, pruned = load_whole(paths.MODEL), load_pruned(paths.PRUNED)
        assert report.pruned_parameters == sum(p.numel() for p in pruned.parameters())
        assert report.whole_parameters == sum(p.numel() for p in whole.parameters())
        assert report.pruned_bytes == weights_bytes(paths.PRUNED)
        n_attentions = sum(s.kind == "attention" for s in removed)
        assert report.shares["kv_cache"] == n_attentions / 4
        assert report.pruned_kv_bytes_per_token == (4 - n_attentions) * 2 * 2 * 32 * 4
        with torch.no_grad(), masked(whole, removed):
            assert torch.allclose(whole(tokens).logits, pruned(tokens).logits, atol=1e-5)
    assert paths.REMOVALS_PICTURE.read_bytes().startswith(b"\x89PNG")


def test_the_divergence_in_the_trajectory_is_that_of_the_pruned_checkpoint(project, tokens):
    search.run(with_changes(search__removals=3))
    report = prune.run(with_changes(prune__budget={"unit": "sublayers", "amount": 3}))
    with torch.no_grad():
        p, q = (m(tokens[:4]).logits.log_softmax(-1) for m in (load_whole(paths.MODEL), load_pruned(paths.PRUNED)))
    m = ((p.exp() + q.exp()) / 2).log()
    js = ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2
    assert report.divergence == pytest.approx(js.mean().item(), rel=1e-4)


def test_pruning_twice_gives_the_same_bytes(project):
    search.run(settings())
    contents = []
    for _ in range(2):
        prune.run(with_changes(prune__budget={"unit": "sublayers", "amount": 3}))
        contents.append({p.name: p.read_bytes() for p in [*paths.PRUNED.iterdir(), paths.REMOVALS_PICTURE]})
    assert contents[0] == contents[1]


def test_the_pruned_directory_brings_its_tokenizer_and_card(project):
    search.run(settings())
    prune.run(with_changes(prune__budget={"unit": "sublayers", "amount": 3}))
    names = {p.name for p in paths.PRUNED.iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_finercut.py"}
    card = (paths.PRUNED / "README.md").read_text()
    assert "tiny, less 3 of 8 sublayers" in card
    assert "| sublayers | 37.5% |" in card
    assert "vllm serve" in card


def test_a_trajectory_of_another_model_is_refused_and_the_old_checkpoint_kept(project):
    search.run(settings())
    prune.run(with_changes(prune__budget={"unit": "sublayers", "amount": 3}))
    before = load_file(paths.PRUNED / "model.safetensors").keys()
    random_llama(hidden_size=64, num_attention_heads=2, num_key_value_heads=1).save_pretrained(paths.MODEL)
    with pytest.raises(ValueError, match="run `finercut search` again"):
        prune.run(with_changes(prune__budget={"unit": "sublayers", "amount": 2}))
    assert load_file(paths.PRUNED / "model.safetensors").keys() == before
