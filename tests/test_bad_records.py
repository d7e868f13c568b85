"""Damaged trajectories, selections and reports, through the commands: one line, not status 0, nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
from bad_input import complaint, mutated, names, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finercut.selection.trajectory import read_trajectory
from pipelines import paths


def edited(change: Callable[[list[dict]], object]) -> Callable[[], None]:
    """The trajectory's lines changed as JSON."""

    def damage() -> None:
        lines = [json.loads(line) for line in paths.TRAJECTORY.read_text().splitlines()]
        change(lines)
        paths.TRAJECTORY.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return damage


def field(line: int, name: str, value: object) -> Callable[[], None]:
    return edited(lambda lines: lines[line].update({name: value}))


def written(content: bytes) -> Callable[[], None]:
    return lambda: paths.TRAJECTORY.write_bytes(content)


TRAJECTORIES: dict[str, tuple[Callable[[], object], str]] = {
    "empty": (written(b""), "is empty"),
    "binary": (written(bytes(range(256))), "trajectory.jsonl"),
    "utf-16": (written("{}".encode("utf-16")), "trajectory.jsonl"),
    "a list": (written(b"[]\n"), "trajectory.jsonl:1: not a trajectory's provenance"),
    "a model": (written(b'{"model_type": "llama"}\n'), "trajectory.jsonl:1"),
    "deep": (written(b"[" * 100_000), "trajectory.jsonl:1"),
    "no provenance": (edited(lambda lines: lines.pop(0)), "trajectory.jsonl:1"),
    "torn": (lambda: os.truncate(paths.TRAJECTORY, paths.TRAJECTORY.stat().st_size - 20), "trajectory.jsonl:5"),
    "blank line": (lambda: paths.TRAJECTORY.write_text(paths.TRAJECTORY.read_text() + "\n"), "trajectory.jsonl:6"),
    "two in one": (lambda: paths.TRAJECTORY.write_text(paths.TRAJECTORY.read_text() * 2), "trajectory.jsonl:6"),
    "a step left out": (edited(lambda lines: lines.pop(2)), "step 3"),
    "a step twice": (edited(lambda lines: lines.insert(2, lines[1])), "step 1"),
    "steps swapped": (edited(lambda lines: lines.reverse()), "trajectory.jsonl:1"),
    "a sublayer twice": (edited(lambda lines: lines[2].update(sublayer=lines[1]["sublayer"])), "trajectory.jsonl:3"),
    "a sublayer of a block gone": (field(2, "sublayer", "0.block"), "trajectory.jsonl:"),
    "no such kind": (field(1, "sublayer", "2.attn"), "trajectory.jsonl:2"),
    "no such block": (field(1, "sublayer", "9.mlp"), "trajectory.jsonl:2"),
    "a negative block": (field(1, "sublayer", "-1.mlp"), "trajectory.jsonl:2"),
    "sublayer null": (field(1, "sublayer", None), "trajectory.jsonl:2: not a removal: sublayer"),
    "divergence a word": (field(1, "divergence", "small"), "trajectory.jsonl:2: not a removal: divergence"),
    "divergence NaN": (field(1, "divergence", "NaN"), "trajectory.jsonl:2: not a removal: divergence"),
    "step zero": (field(1, "step", 0), "trajectory.jsonl:2"),
    "step a share": (field(1, "step", 1.5), "trajectory.jsonl:2: not a removal: step"),
    "unknown field": (field(1, "loss", 1.0), "trajectory.jsonl:2: not a removal: loss"),
    "unknown provenance": (field(0, "mood", 1), "trajectory.jsonl:1"),
    "no blocks": (field(0, "n_blocks", 0), "trajectory.jsonl:1"),
    "a billion blocks": (field(0, "n_blocks", 10**9), "trajectory.jsonl:1"),
    "other candidates": (field(0, "candidates", "heads"), "trajectory.jsonl:1"),
    "protects nothing known": (field(0, "protect", ["head"]), "trajectory.jsonl:1"),
}


@pytest.mark.parametrize(("damage", "message"), TRAJECTORIES.values(), ids=TRAJECTORIES)
def test_a_trajectory_that_cannot_be_inspected(workspace, damage, message):
    damage()
    assert message in refused("inspect", str(paths.TRAJECTORY))


def selected(change: Callable[[dict], object]) -> Callable[[], None]:
    """The selection changed as JSON."""

    def damage() -> None:
        selection = json.loads(paths.SELECTION.read_text())
        change(selection)
        paths.SELECTION.write_text(json.dumps(selection))

    return damage


SELECTIONS: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (paths.SELECTION.unlink, "run `finercut search` first"),
    "empty": (lambda: paths.SELECTION.write_bytes(b""), "artifacts/selection.json is not a Selection"),
    "binary": (lambda: paths.SELECTION.write_bytes(bytes(range(256))), "artifacts/selection.json"),
    "a list": (lambda: paths.SELECTION.write_bytes(b"[]"), "artifacts/selection.json"),
    "deep": (lambda: paths.SELECTION.write_bytes(b"[" * 100_000), "artifacts/selection.json"),
    "no removals": (selected(lambda s: s["removals"].clear()), "nothing to remove"),
    "too short": (selected(lambda s: s["removals"].__delitem__(slice(1, None))), "set search.removals to auto"),
    "a sublayer twice": (selected(lambda s: s["removals"].append(s["removals"][0])), "is removed twice"),
    "no such kind": (selected(lambda s: s["removals"][0].update(candidate="2.attn")), "is not a sublayer"),
    "no such block": (selected(lambda s: s["removals"][0].update(candidate="9.mlp")), "9.mlp: the model has no"),
    "divergence a word": (selected(lambda s: s["removals"][0].update(divergence="small")), "removals.0.divergence"),
    "not nested": (selected(lambda s: s.update(nested=False)), "is not nested"),
    "other number of blocks": (selected(lambda s: s["origin"].update(n_blocks=5)), "a model of 5 blocks"),
    "other model": (selected(lambda s: s["origin"].update(model_sha256=64 * "0")), "run `finercut search` again"),
}


@pytest.mark.parametrize(("damage", "message"), SELECTIONS.values(), ids=SELECTIONS)
def test_a_selection_that_cannot_be_pruned_by(workspace, damage, message):
    damage()
    assert message in refused("prune")


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_trajectory_is_read_as_one_or_refused_in_one_line(compressed, tmp_path, data):
    file = tmp_path / "trajectory.jsonl"
    file.write_bytes(data.draw(mutated((compressed / paths.TRAJECTORY).read_bytes())))
    assert names(file, complaint(read_trajectory, file))


@pytest.mark.parametrize("written", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"note": "good"}', b"[" * 100_000])
@pytest.mark.parametrize("stage", ["search", "summary", "register"])
def test_a_report_that_is_none(workspace, stage, written):
    name = "evaluate" if stage == "register" else "fetch"
    paths.report(name).write_bytes(written)
    assert f"reports/{name}.json" in refused(stage)
