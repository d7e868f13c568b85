"""A committed repository of three toy stages, which write reports that pass the gate."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TOY = f"{sys.executable} {ROOT / 'tests' / 'example_reports.py'}"
STAGES = {
    "prune": {
        "cmd": f"{TOY} model",
        "params": ["search"],
        "outs": ["artifacts/quantised", "reports/curve.csv"],
        "metrics": [f"reports/{name}.json" for name in ("fetch", "calibrate", "search", "prune", "heal", "quantise")],
    },
    "evaluate": {
        "cmd": f"{TOY} evaluate",
        "deps": ["artifacts/quantised"],
        "metrics": ["reports/prove.json", "reports/evaluate_whole.json", "reports/evaluate.json"],
    },
    "throughput": {
        "cmd": f"{TOY} throughput",
        "deps": ["reports/prove.json", "speed_up.txt"],
        "metrics": ["reports/throughput.json"],
    },
}


def make_toy(stages=STAGES, root=Path()):
    """Fills `root`; the settings it wrote."""
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    shutil.copy(ROOT / ".dvcignore", root)
    (root / ".gitignore").write_text("/artifacts/\n/reports/\n/.finercut/\n/mlruns/\n/mlflow.db\n")
    (root / "speed_up.txt").write_text("1.25")
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["register"] |= {"name": root.absolute().name, "min_retention": 0.6, "max_perplexity_ratio": 1.7}
    settings["flow"]["experiment"] = root.absolute().name
    settings["flow"]["retries"] = {}
    write(settings, stages, root)
    commit(root)
    return settings


def commit(root):
    command = "git init -q && git add -A && git -c user.name=t -c user.email=t@t commit -qm toy"
    subprocess.run(command, shell=True, check=True, cwd=root)


def write(settings=None, stages=None, root=Path()):
    if settings is not None:
        (root / "params.yaml").write_text(yaml.safe_dump(settings))
    if stages is not None:
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
