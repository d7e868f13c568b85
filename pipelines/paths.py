"""Where the stages meet: every file one writes and another reads, relative to the project's root."""

from pathlib import Path

MODEL = Path("artifacts/model")
CALIBRATION = Path("artifacts/calibration")
TRAJECTORY = Path("artifacts/trajectory.jsonl")
PRUNED = Path("artifacts/pruned")

REPORTS = Path("reports")
PARITY = REPORTS / "parity.json"
CURVE = REPORTS / "curve.csv"
CURVE_PICTURE = REPORTS / "search.png"
REMOVALS_PICTURE = REPORTS / "removals.png"

# A search in progress, by its provenance: neither dependency nor output, so that DVC leaves it alone.
WORK = Path(".finercut")


def report(stage: str) -> Path:
    return REPORTS / f"{stage}.json"
