"""What the pipeline costs that is not model work: a cached run beside `dvc repro`, and how fast commands start.

    python benchmarks/overhead.py [--rounds 5] [--commands 5]

In a fresh repository of three toy stages where everything is cached, take turns: `dvc repro`, `finercut run` with a
Prefect server that is running, as in production, and `finercut run` that starts one for itself. The differences are
what Prefect and MLflow add. Wall times, one process at a time, medians with the lowest and highest. Needs no model.
Ends with one line of JSON.
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


def seconds(command: list[str], environment: dict[str, str], check: bool = True) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=check, capture_output=True)
    return time.perf_counter() - started


def spread(times: list[float]) -> dict[str, float]:
    return {"median": round(median(times), 3), "low": round(min(times), 3), "high": round(max(times), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of the cached run, after one warm-up")
    parser.add_argument("--commands", type=int, default=5, help="starts of each command, after one warm-up")
    options = parser.parse_args()
    import servers
    from toy import STAGES, make_toy

    finercut = [sys.executable, "-m", "pipelines.cli"]
    root = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as beside:
        os.chdir(folder)
        os.environ["PYTHONPATH"] = root
        os.environ.pop("PREFECT_API_URL", None)
        make_toy()
        environment = os.environ | {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "PREFECT_HOME": f"{beside}/home",
            "DO_NOT_TRACK": "1",
        }
        times: dict[str, list[float]] = {"dvc_repro": [], "run": [], "run_starting_server": []}
        with servers.prefect_server(Path(beside), f"sqlite+aiosqlite:///{beside}/prefect.db") as prefect:
            arms = {
                "dvc_repro": ([sys.executable, "-m", "dvc", "repro"], environment),
                "run": ([*finercut, "run"], environment | {"PREFECT_API_URL": prefect}),
                "run_starting_server": ([*finercut, "run"], environment),
            }
            for number in range(options.rounds + 1):
                # A run first: there is nothing cached before it.
                for name, arm in reversed(arms.items()):
                    taken = seconds(*arm)
                    if number:
                        times[name].append(taken)
        added = {
            name: [ours - dvc for ours, dvc in zip(times[name], times["dvc_repro"], strict=True)]
            for name in ("run", "run_starting_server")
        }
        starts = {
            name: spread(
                [seconds([*finercut, *name.split()], environment, check=False) for _ in range(options.commands + 1)][1:]
            )
            for name in COMMANDS
        }
        os.chdir(root)
    figures = {
        "cached_s": {name: spread(values) for name, values in times.items()},
        "added_s": {name: spread(values) for name, values in added.items()},
        "n_stages": len(STAGES),
        "start_s": starts,
        "n_rounds": options.rounds,
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("prefect", "dvc", "mlflow")},
    }
    for name, figure in (figures["cached_s"] | figures["start_s"]).items():
        print(f"{name:<20}{figure['median']:6.2f} s ({figure['low']:.2f}-{figure['high']:.2f})")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
