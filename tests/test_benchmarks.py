"""The benchmark of the search, in its quick form."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "search.py"


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("search_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert len({tuple(shape.items()) for shape in shapes}) == len(shapes) == 9
    points = [
        {"shape": s, "methods": {m: {"cpu_s": {"median": float(s["hidden"])}} for m in benchmark.METHODS}}
        for s in shapes
    ]
    assert benchmark.growth(points, "hidden")["lazy"] == [(64, 64.0), (128, 128.0), (256, 256.0)]


def test_a_job_that_fails_is_named(benchmark, tmp_path, capfd):
    job = {"method": "lazy", "model": str(tmp_path / "none"), "dtype": "float32", "threads": 1}
    with pytest.raises(SystemExit, match=r"lazy on .*/none failed with status 1, see above"):
        benchmark.in_process(job)
    assert "no model in" in capfd.readouterr().err


def test_the_estimate_counts_the_forwards_of_every_job(benchmark):
    # 8 sublayers, 2 removals, 3 windows: 3 * (8 + 7) forwards of 2 s, of which the authors' first step is 3 * 8
    chosen = argparse.Namespace(windows=3, timed_steps=1, model_rounds=2)
    others = 90 / 1.6 + 2 * (90 / 2.1 + 90 / 3.8 + 90 / 3.8)
    assert benchmark.estimate_s(chosen, 2.0, 8) == pytest.approx(2 * 1.2 * 48 + others)
