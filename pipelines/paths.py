"""The files that one stage writes and another reads, relative to the project's root."""

from pathlib import Path

PARAMS = Path("params.yaml")

MODEL = Path("artifacts/model")
CALIBRATION = Path("artifacts/calibration")
TRAJECTORY = Path("artifacts/trajectory.jsonl")
SELECTION = Path("artifacts/selection.json")
PRUNED = Path("artifacts/pruned")
HEALED = Path("artifacts/healed")

# The steps on a checkpoint, in order, each with what it writes; the first one's parent is the whole model.
CHAIN = {"prune": PRUNED, "heal": HEALED}
# What is evaluated, timed, registered and served.
FINAL = list(CHAIN.values())[-1]

REPORTS = Path("reports")
ENVIRONMENT = REPORTS / "environment.json"
CURVE = REPORTS / "curve.csv"
CURVE_PICTURE = REPORTS / "search.png"
REMOVALS_PICTURE = REPORTS / "removals.png"

# This clone's working files, which DVC leaves alone: the lock, searches in progress, downloads, promotions under way,
# the params file that another one replaced.
WORK = Path(".finercut")


def report(stage: str) -> Path:
    return REPORTS / f"{stage}.json"
