"""The benchmarks of the search: in its quick form, and what is replayed."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from finercut.model.loading import load_whole
from finercut.selection.greedy import search
from finercut.sublayers import Sublayer
from finercut.system import yaml_files
from finercut.tokens import load_tokens
from pipelines.params import Params

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark():
    return load("search")


@pytest.fixture
def replay(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return load("replay")


def test_all_methods_find_the_order_of_brute_force_and_the_last_line_is_json(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["search.py", "--quick", "--threads", "1"])
    benchmark.main()
    printed = capsys.readouterr().out.splitlines()
    document = json.loads(printed[-1])
    (point,) = document["random_models"]
    methods = point["methods"]
    assert list(methods) == ["authors", "brute", "exact", "lazy", "racing"]
    assert all(figures["same_order"] for figures in methods.values())
    # 8 and then 7 candidates in 4 windows, each through the 7 and then 6 sublayers left
    assert methods["authors"]["sublayer_passes"] == 4 * (8 * 7 + 7 * 6)
    assert methods["brute"]["fewer_passes"] == 2
    assert (
        methods["lazy"]["sublayer_passes"] < methods["exact"]["sublayer_passes"] < methods["brute"]["sublayer_passes"]
    )
    for figures in methods.values():
        assert figures["wall_s"]["low"] <= figures["wall_s"]["median"] <= figures["wall_s"]["high"]
    machine = document["environment"]
    assert machine["gflops_a_core"].keys() == {"float32", "bfloat16"}
    assert {"cpu", "threads", "rounds", "warm_up", "torch", "transformers"} <= machine.keys()
    assert sum(line.startswith(("authors", "brute", "exact", "lazy", "racing")) for line in printed) == 5


def test_the_sizes_that_grow_are_measured_once_each(benchmark):
    shapes = list(benchmark.distinct_shapes())
    assert len({tuple(shape.items()) for shape in shapes}) == len(shapes) == 11
    points = [
        {"shape": s, "methods": {m: {"cpu_s": {"median": float(s["hidden"])}} for m in benchmark.METHODS}}
        for s in shapes
    ]
    assert benchmark.growth(points, "hidden")["lazy"] == [(64, 64.0), (128, 128.0), (256, 256.0)]


def test_a_job_that_fails_is_named(benchmark, tmp_path, capfd):
    job = {"method": "lazy", "model": str(tmp_path / "none"), "dtype": "float32", "device": "cpu", "threads": 1}
    with pytest.raises(SystemExit, match=r"lazy on .*/none failed with status 1, see above"):
        benchmark.in_process(job)
    assert "no model in" in capfd.readouterr().err


def test_the_estimate_counts_the_forwards_of_every_job(benchmark):
    # 8 sublayers, 2 removals, 3 windows: 3 * (8 + 7) forwards of 2 s, of which the authors' first step is 3 * 8
    chosen = argparse.Namespace(windows=3, timed_steps=1, model_rounds=2)
    others = 90 / 1.6 + 2 * (90 / 2.1 + 90 / 3.8 + 90 / 3.8)
    assert benchmark.estimate_s(chosen, 2.0, 8) == pytest.approx(2 * 1.2 * 48 + others)


def test_a_replay_counts_what_every_way_of_deciding_evaluates(replay):
    # Three candidates, four windows of one segment; 5, 4 and 3 sublayers a window.
    values = {Sublayer(0, "attention"): 1.0, Sublayer(0, "mlp"): 2.0, Sublayer(1, "attention"): 3.0}
    recorded = {c: [(value,)] * 4 for c, value in values.items()}
    passes = dict(zip(values, (5, 4, 3), strict=True))

    def counted(way):
        one = replay.Replay(way, 4, 0.05)
        one.step(recorded, passes)
        assert (one.steps, one.other) == (1, 0)
        return one.passes, one.segments

    assert counted("brute") == (4 * (5 + 4 + 3), 12)
    # All on one window, the first to its end at 4; the third is at 6 after one more window, the second at 4 not above
    # it, but on its next two windows.
    assert counted("exact") == (4 * 5 + 2 * 3 + 4 * 4, 4 + 2 + 4)
    assert counted("one window") == counted("one window, lazy") == (4 * 5 + 4 + 3, 6)
    lazy = replay.Replay("one window, lazy", 4, 0.05)
    lazy.known = {c: [value] * 4 for c, value in values.items()}
    lazy.step(recorded, passes)
    # What they came to before is above the least value.
    assert lazy.passes == 4 * 5


def test_what_is_replayed_is_what_a_search_finds(replay, compressed, monkeypatch, capsys):
    monkeypatch.chdir(compressed)
    monkeypatch.setattr(sys, "argv", ["replay.py", "--windows", "4", "--tokens", "8", "--removals", "3"])
    replay.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = load_whole(Path("artifacts/model"), torch.float32)
    tokens = torch.cat(load_tokens(Path("artifacts/calibration")).calibration.split(8, dim=1))
    ways = {way["way"]: way for way in document["ways"]}
    for mode in replay.MODES:
        found = list(search(model, tokens, tokens[:1], 3, mode=mode))
        assert document["removals"] == [removal.sublayer for removal in found]
        assert ways[mode]["sublayer_passes"] == sum(removal.sublayer_passes for removal in found)
        assert ways[mode]["head_tokens"] == sum(removal.head_tokens for removal in found)
        assert (ways[mode]["steps"], ways[mode]["other_removals"]) == (3, 0)


@pytest.mark.slow
def test_every_method_of_the_quality_benchmark_goes_with_the_default_params():
    quality = load("quality")
    values = yaml_files.read(BENCHMARKS.parent / "params.yaml")
    for name, method in quality.METHODS.items():
        search_ = values["search"] | {"mode": "lazy", "removals": "auto"} | method
        assert Params.model_validate(values | {"search": search_}).search.method == method.get("method", "greedy"), name
    for heal in quality.HEALING.values():
        tokens = {"tokens": 32768} if heal["method"] == "distill" else {}
        assert Params.model_validate(values | {"heal": heal | tokens}).heal.method == heal["method"]
