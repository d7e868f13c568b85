"""The stage `search`, run in a project directory on the tiny model."""

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
from stage_project import fresh, settings, with_changes

from finercut.selection.selection import Selection
from finercut.selection.trajectory import read_trajectory
from finercut.tokens import Tokens, write_tokens
from pipelines import inspection, params, paths, prune, search, search_methods, steps

ROOT = Path(__file__).parent.parent


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
    write_tokens(fresh(paths.CALIBRATION), Tokens(few[:4], few[4:6], few[6:]), {})
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
    write_tokens(fresh(paths.CALIBRATION), Tokens(tokens[:1, :2].clone(), tokens[1:, :2].contiguous()), {})
    report = search.run(with_changes(search__removals=2))
    assert report.final_held_out_divergence > 1.5 * report.final_divergence, "two tokens are easy to overfit"
    assert report.curves_part
    assert "the removals fit the calibration set" in caplog.text


def test_every_source_counts_alike_and_the_worst_one_is_what_parts(project, tokens, caplog):
    # What is held out is what calibrates, but for one window of a source of its own.
    indices = {"calibration_sources": torch.tensor([0, 1, 0, 0]), "held_out_sources": torch.tensor([0, 1, 0, 0, 2])}
    mixed = Tokens(tokens[:4], tokens[:5].clone(), **indices, sources=("a", "b", "c"), unseen=("c",))
    write_tokens(fresh(paths.CALIBRATION), mixed, {})
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
    write_tokens(fresh(paths.CALIBRATION), Tokens(tokens[:4], tokens[:5].clone()), {})
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
