"""The stage `search` by every method, with swaps, limits and tasks."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from stage_project import settings, with_changes

from finercut.model.loading import load_whole
from finercut.model.masking import masked
from finercut.selection.selection import Selection
from finercut.selection.trajectory import read_trajectory
from finercut.sublayers import parse
from pipelines import paths, prune, search, search_job

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


def test_evolution_removes_nothing_that_saves_none_of_the_budget(project):
    report = search.run(by_method("evolutionary", prune__budget={"unit": "kv_cache", "amount": 0.5}))
    assert report.removals
    assert all(name.endswith("attention") for name in report.removals)


def test_swaps_need_a_removal_within_the_budget(project):
    changes = {
        "search__swaps": 1,
        "search__fill": False,
        "search__removals": "auto",
        "search__protect": ["3.attention"],
    }
    with pytest.raises(ValueError, match=r"the first removal, 3\.mlp, is already over the budget"):
        search.run(with_changes(**changes, prune__budget={"unit": "parameters", "amount": 0.1}))


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
        ({"search__refit": {}, "calibrate__n_healing_samples": 0}, "calibrate.n_healing_samples to 2 at least, not 0"),
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
