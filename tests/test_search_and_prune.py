"""The stages `search` and `prune`, run in a project directory on the tiny model."""

import copy
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
from bad_input import VALID
from conftest import random_llama
from safetensors.torch import load_file

from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.model.tensors import weights_bytes, weights_sha256
from finercut.selection.selection import Selection
from finercut.selection.trajectory import read_trajectory
from finercut.sources.records import FetchReport
from finercut.sublayers import parse
from finercut.tokens import Tokens, write_tokens
from pipelines import inspection, params, paths, prune, search, search_job, search_methods, stability, steps

ROOT = Path(__file__).parent.parent


def settings(**changes) -> params.Params:
    """The project's params with dotted changes, for the tiny model."""
    values = copy.deepcopy(VALID)
    values["search"] |= {"mode": "exact", "candidates": "both", "per": None, "fill": False, "continuation_tokens": 4}
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


def test_a_selection_is_told_as_its_trajectory_is(project):
    search.run(settings())
    selected = inspection.describe(str(paths.SELECTION)).splitlines()
    assert selected[0] == "method: greedy"
    n_removals = len(Selection.read(paths.SELECTION).removals)
    assert selected[-n_removals:] == inspection.describe(str(paths.TRAJECTORY)).splitlines()[-n_removals:]


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


def test_what_is_left_is_reckoned_without_the_first_step_which_evaluates_every_candidate():
    assert search_methods.left_s([100.0], 4) is None
    assert search_methods.left_s([100.0, 102.0, 106.0], 4) == 12.0


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


def test_a_search_that_refits_says_what_pruning_and_then_healing_by_refit_come_to(project):
    few = torch.randint(3, 30, (54, 24), generator=torch.Generator().manual_seed(0))
    write_tokens(_fresh(paths.CALIBRATION), Tokens(few[:4], few[4:6], few[6:]), {})
    how = {"ridges": [0.01, 0.1, 1.0], "batch_tokens": 256}
    changes = {"search__removals": 3, "search__refit": how, "prune__budget": {"unit": "sublayers", "amount": 3}}
    found = search.run(with_changes(**changes))
    assert found.method == "greedy_refitted"
    ran = with_changes(**changes)
    healing = {"method": "refit", "fractions": [1.0], "dtype": "float32", "device": "cpu"}
    ran = params.Params.model_validate(ran.model_dump(by_alias=True) | {"heal": healing | how})
    prune.run(ran)
    healed = steps.run_and_report("heal", ran)
    assert healed.divergence_before == pytest.approx(found.final_held_out_divergence, rel=1e-4)
    assert healed.divergence_after == pytest.approx(found.final_refitted.held_out_divergence, rel=1e-3)
    assert healed.divergence_after < 0.95 * healed.divergence_before


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
    for n_whole, n_torn in ((0, 40), (3, 100)):
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


def test_every_source_counts_alike_and_the_worst_one_is_what_parts(project, tokens, caplog):
    # What is held out is what calibrates, but for one window of a source of its own.
    indices = {"calibration_sources": torch.tensor([0, 1, 0, 0]), "held_out_sources": torch.tensor([0, 1, 0, 0, 2])}
    mixed = Tokens(tokens[:4], tokens[:5].clone(), **indices, sources=("a", "b", "c"), unseen=("c",))
    write_tokens(_fresh(paths.CALIBRATION), mixed, {})
    report = search.run(with_changes(search__removals=2))
    found = read_trajectory(paths.TRAJECTORY)
    assert found.provenance.window_weights == [2 / 3, 2, 2 / 3, 2 / 3]
    of = found.removals[-1].held_out_by_source
    assert report.final_held_out_by_source == of
    assert report.final_divergence == pytest.approx((of["a"] + of["b"]) / 2)
    assert report.final_held_out_divergence == pytest.approx((of["a"] + of["b"] + of["c"]) / 3)
    assert search._worst(found.removals[-1]) == (
        f" of {max(of, key=of.get)}",
        max(of.values()) / report.final_divergence,
    )
    far = found.removals[-1].model_copy(update={"held_out_by_source": of | {"c": 2 * report.final_divergence}})
    assert search._worst(far) == (" of c", 2.0)
    # The same windows, said to be of one source, are another search.
    write_tokens(_fresh(paths.CALIBRATION), Tokens(tokens[:4], tokens[:5].clone()), {})
    assert search.run(with_changes(search__removals=2)).resumed_after == 0
    assert read_trajectory(paths.TRAJECTORY).provenance.window_weights is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search__removals": 9}, "cannot remove 9 of 8 candidates"),
        ({"search__removals": 0.1}, "cannot remove 0 of 8 candidates"),
        ({"search__protect": ["7.mlp"]}, "blocks 0 to 3"),
        ({"search__device": "abacus"}, "no device 'abacus'"),
        ({"search__continuation_tokens": 400}, "search.continuation_tokens = 400: after .* has room for"),
        ({"search__n_processes": 5}, "search.n_processes = 5 cannot share 4 calibration windows: lower it"),
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


BLOCKWISE = ("last_blocks", "shortgpt", "gromov", "sleb")
METHODS = ("random", "one_shot", "llm_drop", "block_pruner", "evolutionary", *BLOCKWISE)
NOT_NESTED = ("gromov", "evolutionary")
BUDGET = {"unit": "parameters", "amount": 0.5}
EVOLUTION = {"generations": 6, "offspring": 6}


def by_method(method, **changes):
    kinds = "blocks" if method in BLOCKWISE else "both"
    chosen = {"search__candidates": kinds, "search__removals": "auto", "prune__budget": BUDGET}
    return with_changes(**chosen | {"search__method": method, "search__evolution": EVOLUTION} | changes)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_selection_and_a_curve_that_prune_takes(project, tokens, method):
    chosen = by_method(method)
    report = search.run(chosen)
    selection, found = Selection.read(paths.SELECTION), read_trajectory(paths.TRAJECTORY)
    assert report.method == selection.method == found.provenance.method == method
    assert report.nested == selection.nested == (method not in NOT_NESTED)
    assert report.removals == [c.candidate for c in selection.removals] == [r.sublayer for r in found.removals]
    line = json.loads(paths.TRAJECTORY.read_text().splitlines()[1])
    assert line.keys() == {"step", "sublayer", "divergence", "held_out_divergence", "held_out_by_source", "controls"}
    with paths.CURVE.open() as file:
        assert [float(row["divergence"]) for row in csv.DictReader(file)] == [c.divergence for c in selection.removals]
    assert paths.CURVE_PICTURE.read_bytes().startswith(b"\x89PNG")
    pruned = prune.run(chosen)
    assert 0 < pruned.shares["parameters"] <= 0.5
    n_blocks = 2 if method in BLOCKWISE else 0
    assert not n_blocks or pruned.n_removals == n_blocks
    with torch.no_grad(), masked(load_whole(paths.MODEL), [s for n in pruned.removed for s in parse(n).sublayers]) as m:
        q = m(tokens[:4]).logits.log_softmax(-1)
    with torch.no_grad():
        p = load_whole(paths.MODEL)(tokens[:4]).logits.log_softmax(-1)
    middle = ((p.exp() + q.exp()) / 2).log()
    js = ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2
    assert pruned.divergence == pytest.approx(js.mean().item(), rel=1e-4)


def test_random_with_another_seed_is_another_selection(project):
    removals = [search.run(by_method("random", search__seed=seed)).removals for seed in (0, 0, 1)]
    assert removals[0] == removals[1] != removals[2]
    assert read_trajectory(paths.TRAJECTORY).provenance.seed == 1


def test_filled_budgets_are_used_up_where_unfilled_ones_end(project):
    # 244,742 parameters may go. 3.attention 49,280, 3.mlp 73,856, 2.attention, then 2.mlp: 246,272.
    budget = {"unit": "parameters", "amount": 0.45}
    spent, removals = {}, {}
    for fill in (False, True):
        chosen = by_method("greedy", search__fill=fill, prune__budget=budget)
        removals[fill] = search.run(chosen).removals
        spent[fill] = prune.run(chosen).shares["parameters"]
    assert removals[False] == ["3.attention", "3.mlp", "2.attention", "2.mlp"]
    assert removals[True] == ["3.attention", "3.mlp", "2.attention", "1.attention"]
    assert spent[False] < spent[True] <= 0.45
    assert Selection.read(paths.SELECTION).nested
    # the first removals of a filled selection are one for a smaller budget
    smaller = prune.run(by_method("greedy", prune__budget={"unit": "parameters", "amount": 0.25}))
    assert smaller.n_removals == 2


def test_a_search_per_parameters_is_named_so_and_does_not_continue_a_plain_one(project):
    plain = search.run(by_method("greedy"))
    priced = search.run(by_method("greedy", search__per="parameters", search__candidates="any"))
    assert (plain.method, priced.method) == ("greedy", "greedy_per_parameters")
    assert priced.resumed_after == 0
    assert priced.removals != plain.removals
    assert prune.run(by_method("greedy")).method == "greedy_per_parameters"


SWAPS = {"search__swaps": 2, "search__per": "parameters", "search__fill": True}


def test_swaps_lower_the_divergence_of_the_greedy_search_they_continue(project):
    greedily = search.run(by_method("greedy", **SWAPS | {"search__swaps": 0}))
    swapped = search.run(by_method("greedy", **SWAPS))
    assert swapped.method == "greedy_per_parameters_swaps"
    assert swapped.resumed_after == greedily.n_removals
    assert swapped.final_divergence <= greedily.final_divergence * (1 + 1e-6)
    selection = Selection.read(paths.SELECTION)
    assert not selection.nested
    assert selection.left == []
    assert len(set(greedily.removals) - set(swapped.removals)) <= swapped.n_swaps
    assert prune.run(by_method("greedy", **SWAPS)).removed == swapped.removals
    with pytest.raises(ValueError, match="is not nested; select again for this budget"):
        prune.run(by_method("greedy", prune__budget={"unit": "parameters", "amount": 0.2}))


def test_swaps_cut_anywhere_continue_to_the_same_bytes(project):
    chosen = by_method("greedy", **SWAPS)
    search.run(chosen)
    undisturbed = paths.TRAJECTORY.read_bytes(), paths.SELECTION.read_bytes()
    (in_progress,) = paths.WORK.rglob("swaps.jsonl")
    lines = in_progress.read_bytes().splitlines(keepends=True)
    for n_whole, n_torn in ((1, 10), (len(lines) - 1, 30)):
        in_progress.write_bytes(b"".join(lines[:n_whole]) + lines[n_whole][:n_torn])
        search.run(chosen)
        assert (paths.TRAJECTORY.read_bytes(), paths.SELECTION.read_bytes()) == undisturbed
        assert in_progress.read_bytes() == b"".join(lines)


def test_a_limit_of_stop_ends_a_search_and_prune_takes_what_there_is(project, caplog):
    whole = search.run(by_method("greedy"))
    steps = read_trajectory(paths.TRAJECTORY).removals
    agreements = [step.controls.agreement for step in steps]
    assert whole.controls == steps[-1].controls
    assert whole.stopped is None
    assert agreements[0] > agreements[-1]
    n = next(n for n, agreement in enumerate(agreements) if agreement < agreements[0])
    chosen = by_method("greedy", search__stop={"agreement": agreements[0]})
    stopped = search.run(chosen)
    assert stopped.removals == whole.removals[:n]
    assert stopped.resumed_after == n, "nothing is searched again"
    assert stopped.stopped == (f"agreement {agreements[n]:.3g} is below search.stop.agreement = {agreements[0]:g}")
    assert f"search: ended after {n} removals: the next one's agreement" in caplog.text
    assert prune.run(chosen).removed == stopped.removals, "within the budget, though it allows more"
    assert search.run(by_method("greedy")).removals == whole.removals, "without the limit, it goes on"
    shutil.rmtree(paths.WORK)
    assert search.run(chosen).removals == stopped.removals


def test_a_limit_ends_other_methods_too_and_one_that_leaves_nothing_is_an_error(project):
    ranked = search.run(by_method("one_shot"))
    steps = read_trajectory(paths.TRAJECTORY).removals
    limit = steps[0].controls.agreement
    n = next(n for n, step in enumerate(steps) if step.controls.agreement < limit)
    stopped = search.run(by_method("one_shot", search__stop={"agreement": limit}))
    assert stopped.removals == ranked.removals[:n]
    assert stopped.stopped
    for method in ("one_shot", "greedy"):
        with pytest.raises(ValueError, match="search.stop leaves nothing to remove: after the first removal, .*below"):
            search.run(by_method(method, search__stop={"agreement": 0.999}))


def test_a_limit_on_ends_is_refused_where_a_text_has_none(project):
    for name in ("config.json", "generation_config.json"):
        file = paths.MODEL / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
    with pytest.raises(ValueError, match="search.stop.missing_ends: the model has no end-of-sequence token"):
        search.run(with_changes(search__stop={"missing_ends": 0.5}))


@pytest.mark.parametrize("start", ["greedy", "random"])
def test_an_evolutionary_search_cut_anywhere_continues_to_the_same_bytes(project, start):
    budget = BUDGET | {"amount": 0.4}
    chosen = by_method("evolutionary", prune__budget=budget, search__evolution=EVOLUTION | {"start": start})
    report = search.run(chosen)
    assert report.n_generations == 6
    undisturbed = paths.TRAJECTORY.read_bytes(), paths.SELECTION.read_bytes()
    (in_progress,) = paths.WORK.rglob("generations.jsonl")
    lines = in_progress.read_bytes().splitlines(keepends=True)
    assert any(json.loads(line)["put_back"] for line in lines) or start == "greedy"
    for n_whole, n_torn in ((0, 0), (3, 20)):
        in_progress.write_bytes(b"".join(lines[:n_whole]) + lines[n_whole][:n_torn])
        search.run(chosen)
        assert (paths.TRAJECTORY.read_bytes(), paths.SELECTION.read_bytes()) == undisturbed
        assert in_progress.read_bytes() == b"".join(lines)
    if start == "greedy":
        greedily = search.run(by_method("greedy", search__fill=True, prune__budget=budget))
        assert report.final_divergence <= greedily.final_divergence * (1 + 1e-6)


def test_a_task_decides_and_an_edit_of_its_examples_is_noticed(project):
    lines = [{"prompt": f"The river number {i} is", "answer": word} for i, word in enumerate(("long", "wide") * 4)]
    file = Path("task.jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = search.run(settings())
    chosen = with_changes(search__divergence="task", search__task="task.jsonl")
    report = search.run(chosen)
    assert report.divergence == "task"
    assert report.removals != plain.removals
    assert not search.is_stale(chosen)
    file.write_text(file.read_text().replace("wide", "deep"))
    assert search.is_stale(chosen)
    assert search.run(chosen).resumed_after == 0
    assert not search.is_stale(chosen)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="search.task: no file task.jsonl"):
        search.run(chosen)


def test_stability_is_the_overlap_of_searches_on_two_halves(project, tokens):
    removed = []
    for half in (tokens[:4:2], tokens[1:4:2]):
        shutil.rmtree(paths.CALIBRATION)
        write_tokens(_fresh(paths.CALIBRATION), Tokens(half.contiguous(), tokens[4:]), {})
        removed.append(set(search.run(settings()).removals))
    write_tokens(_fresh(paths.CALIBRATION), Tokens(tokens[:4], tokens[4:]), {})
    before = {file: file.read_bytes() for file in (paths.TRAJECTORY, paths.SELECTION, paths.report("search"))}
    shutil.rmtree(paths.WORK)
    said = stability.run(settings())
    shared = len(removed[0] & removed[1]) / len(removed[0] | removed[1])
    assert f"overlap of the removed sublayers {shared:.2f}" in said
    for name in removed[0] ^ removed[1]:
        which = "first" if name in removed[0] else "second"
        assert any(name in line for line in said.splitlines() if f"only the {which} removes" in line)
    assert before == {file: file.read_bytes() for file in before}


def test_the_overlap_by_hand():
    first, second = ({s for n in names for s in parse(n).sublayers} for names in (["0.block"], ["0.mlp", "1.mlp"]))
    assert stability.overlap(first, second) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search__method": "random"}, "random looks at no windows"),
        ({"search__method": "last_blocks", "search__candidates": "blocks"}, "last_blocks looks at no windows"),
        ({"search__divergence": "task", "search__task": "t"}, "search.task decides"),
    ],
)
def test_stability_of_what_does_not_depend_on_the_windows_is_refused(project, changes, message):
    with pytest.raises(ValueError, match=message):
        stability.run(with_changes(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search__method": "shortgpt"}, "method shortgpt cannot choose among candidates both: blocks"),
        ({"search__method": "random", "search__mode": "lazy"}, "mode lazy belongs to method greedy, not random"),
        ({"search__method": "block_pruner", "search__mode": "racing"}, "mode racing belongs to method greedy"),
        ({"search__method": "one_shot", "search__exclude": 0.4}, "exclude belongs to methods that go step by step"),
        ({"search__method": "llm_drop", "search__swaps": 1}, "per and swaps belong to method greedy, not llm_drop"),
        ({"search__per": "parameters", "search__mode": "racing"}, "racing cannot weigh divergences"),
        ({"search__per": "milliseconds"}, "per"),
        ({"search__per": "kv_cache"}, "removing 0.mlp saves none of it"),
        ({"search__swaps": 1, "search__removals": 5}, "set removals to auto"),
        ({"search__method": "gromov", "search__candidates": "blocks", "search__removals": 5}, "set removals to auto"),
        ({"search__swaps": 1, "search__exclude": 0.4}, "exclude goes neither with swaps"),
        ({"search__refit": {}, "search__mode": "lazy"}, "refit goes with method greedy, mode exact and no swaps"),
        ({"search__refit": {}, "search__n_processes": 2}, "set n_processes to 1"),
        ({"search__refit": {}, "search__stop": {"agreement": 0.5}}, "stop judges the model without its refit"),
        ({"search__refit": {}}, "search.refit fits to healing windows, and there are none"),
        ({"search__method": "evolutionary", "search__removals": 5}, "set removals to auto"),
        ({"search__method": "evolutionary", "search__exclude": 0.4}, "exclude belongs to methods that go step by step"),
        (
            {"search__divergence": "perplexity", "search__mode": "lazy"},
            "perplexity falls with some removals, so mode",
        ),
        (
            {"search__divergence": "task", "search__task": "t", "search__mode": "racing"},
            "task falls with some removals",
        ),
        ({"search__divergence": "task"}, "go together: give both or neither"),
        ({"search__task": "task.jsonl"}, "go together: give both or neither"),
        ({"search__divergence": "task", "search__task": "t", "search__method": "one_shot"}, "task belongs to methods"),
        ({"search__stop": {"repetition": 0.5}, "search__continuations": 0}, "need continuations"),
        ({"search__stop": {"agreement": 0.5}, "search__swaps": 1}, "stop cannot cut what swaps"),
        ({"search__stop": {"agreement": 0.5}, "search__method": "evolutionary"}, "stop cannot cut what swaps"),
        (
            {"search__method": "gromov", "search__candidates": "blocks", "prune__budget": BUDGET | {"amount": 0.1}},
            "is less than any single candidate",
        ),
    ],
)
def test_a_method_that_cannot_be_is_one_error_before_the_model_is_loaded(project, monkeypatch, changes, message):
    monkeypatch.setattr(search_job, "load_on", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        search.run(with_changes(**{"search__removals": "auto", "prune__budget": BUDGET} | changes))
    assert not paths.SELECTION.exists()
