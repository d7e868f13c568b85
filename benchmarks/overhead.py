"""What the pipeline costs that is not model work: a cached run beside `dvc repro`, and how fast commands start.

    python benchmarks/overhead.py [--rounds 5] [--commands 5]

In a fresh repository of three toy stages, `finercut run` and `dvc repro` take turns when everything is
cached; the difference, and that per stage, is what Prefect and MLflow add. Wall times, one process at a time, medians
with the lowest and highest. Needs no model. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
COMMANDS = ("--help", "run --help", "search --help", "params", "summary", "inspect .", "deploy --help")


def seconds(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=False, capture_output=True)
    return time.perf_counter() - started


def spread(times: list[float]) -> dict[str, float]:
    return {"median": round(median(times), 3), "low": round(min(times), 3), "high": round(max(times), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the cached run, after one warm-up")
    parser.add_argument("--commands", type=int, default=5, help="starts of each command, after one warm-up")
    options = parser.parse_args()
    from toy import STAGES, make_toy

    finercut = [sys.executable, "-m", "pipelines.cli"]
    root = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["PYTHONPATH"] = root
        make_toy()
        environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "DO_NOT_TRACK": "1"}
        subprocess.run([*finercut, "run"], env=environment, check=True, capture_output=True)
        run: list[float] = []
        repro: list[float] = []
        for _ in range(options.rounds):
            run.append(seconds([*finercut, "run"], environment))
            repro.append(seconds([sys.executable, "-m", "dvc", "repro"], environment))
        extra = [a - b for a, b in zip(run, repro, strict=True)]
        starts = {
            name: spread([seconds([*finercut, *name.split()], environment) for _ in range(options.commands + 1)][1:])
            for name in COMMANDS
        }
        os.chdir(root)
    figures = {
        "cached_run_s": spread(run),
        "dvc_repro_s": spread(repro),
        "added_s": spread(extra),
        "n_stages": len(STAGES),
        "start_s": starts,
        "n_rounds": options.rounds,
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("prefect", "dvc", "mlflow")},
    }
    print(f"cached run    {spread(run)['median']:6.2f} s, of which dvc repro {spread(repro)['median']:.2f} s")
    print(f"added         {median(extra):6.2f} s, {median(extra) / len(STAGES):.2f} s a stage of {len(STAGES)}")
    for name, figure in starts.items():
        print(f"{name:<14}{figure['median']:6.2f} s ({figure['low']:.2f}-{figure['high']:.2f})")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
