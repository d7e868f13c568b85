"""Paths of the files that stages exchange, relative to the project's root."""

from pathlib import Path

PARAMS = Path("params.yaml")
"""The settings; DVC reads no other file."""

MODEL = Path("artifacts/model")
CALIBRATION = Path("artifacts/calibration")
TRAJECTORY = Path("artifacts/trajectory.jsonl")
SELECTION = Path("artifacts/selection.json")
PRUNED = Path("artifacts/pruned")
HEALED = Path("artifacts/healed")
QUANTISED = Path("artifacts/quantised")

# The steps on a checkpoint, in order, each with what it writes; the first one's parent is the whole model.
CHAIN = {"prune": PRUNED, "heal": HEALED, "quantise": QUANTISED}
# What is evaluated, timed, registered and served.
FINAL = list(CHAIN.values())[-1]

REPORTS = Path("reports")
ENVIRONMENT = REPORTS / "environment.json"
CURVE = REPORTS / "curve.csv"
CURVE_PICTURE = REPORTS / "search.png"
REMOVALS_PICTURE = REPORTS / "removals.png"
FRONTIER_PICTURE = REPORTS / "frontier.png"

PAGE = REPORTS / "report.html"
COMPARISON = REPORTS / "compare.html"

WORK = Path(".finercut")
"""What is neither input nor output of a stage, so that DVC leaves it alone: `lock`, held by the process that works in
this workspace; `container.lock`, held by a container that prepares it; `search/` and `heal/`, searches and trainings in
progress; `costs/`, a model that is timed; `fetch/` and `promote/`, downloads in progress; FORESEEN; PREVIOUS;
TRACEBACK."""
FORESEEN = WORK / "foreseen"
"""Hash of that for which nothing was in the way of later stages."""
PREVIOUS = WORK / "params.previous.yaml"
"""What params.yaml was before another file replaced it."""
TRACEBACK = WORK / "traceback.txt"
"""Of the last error that nobody foresaw."""


def report(stage: str) -> Path:
    return REPORTS / f"{stage}.json"
