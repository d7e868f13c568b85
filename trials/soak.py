"""Scheduled runs back to back: whether each left the record it should, and what they leave behind.

`make test-matrix` does a few, of toy stages; `make soak` does two dozen of real ones, prints a table and ends with one
line of JSON. Everything is real but the size of the model: databases, store, servers, worker, schedules, stages, vLLM.

Checked after each run:
- its state in Prefect, its one run in MLflow, what ran and what came from the cache, its version, the alias, and which
  versions still have a checkpoint: all as the plan has them, which is reckoned without DVC, Prefect and MLflow;
- no process of it is left, and nothing in the folders for temporary files.

Checked at the end: what is bounded by rule does not grow any more. The clone (less DVC's notes of which inputs gave
which outputs), the checkpoints in MLflow's store, and the worker's home, caches and temporary files may each be no more
than 2 % larger at any time in the last third of the runs than they ever were in the middle third. What MLflow keeps of
each run and version by design, and DVC's notes, are shown with what they grow by.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import servers
from scheduled_runs import Disk, Expected, Outcome, Planned, Site, follow, schedule

# Fewer runs do not tell whether anything still grows.
ENOUGH = 24
MARGIN = 1.02
# Not `notes` and `records`, which grow with every run.
BOUNDED = ("workspace", "checkpoints", "worker")


# What each setting of the plan makes run again, by hand from dvc.yaml.
OF_THE_BUDGET = ("search", "prune", "heal", "quantise", "prove", "evaluate", "throughput")
OF_THE_MODEL = ("fetch", "costs")
OF_THE_TEXT = ("calibrate", "prove_whole", "evaluate_whole", *OF_THE_BUDGET)
STAGES = (*OF_THE_MODEL, *OF_THE_TEXT)
CONCERNED = {"calibrate.shuffle_seed": OF_THE_TEXT, "prune.budget.amount": OF_THE_BUDGET}


def plan(n_runs: int) -> list[Planned]:
    """Eight kinds of run, again and again with other seeds, so that each third of 24 runs leaves as much.

    vLLM starts in as few as these kinds allow: four engines a measurement are most of the time.
    """

    def of(seed: int, amount: int, others: Mapping[str, object] | None = None, ending: str = "registered") -> Planned:
        return Planned({"calibrate.shuffle_seed": seed, "prune.budget.amount": amount}, dict(others or {}), ending)

    planned = []
    for seed in range(math.ceil(n_runs / 8)):
        planned += [
            of(seed, 2),
            of(seed, 2),  # nothing has changed
            of(seed, 2, {"register.min_speed_up": 1000}, "refused"),
            of(seed, 3, {"flow.timeout_s.throughput": 20}, "throughput"),  # killed with vLLM's engines running
            of(seed, 3),
            of(seed, 7, ending="prune"),  # more than was searched for
            of(seed, 3),  # as before the failure
            of(0, 2 if seed else 3),  # made before, and collected since
        ]
    return planned[:n_runs]


def growth(done: Sequence[Outcome]) -> list[str]:
    """What is still growing in the last third of the runs, and should not."""
    third = len(done) // 3
    middle, last = done[third : 2 * third], done[2 * third :]
    found = []
    for name in BOUNDED:
        was, is_now = (max(getattr(outcome.disk, name) for outcome in part) for part in (middle, last))
        if is_now > MARGIN * was:
            found.append(f"{name} grew from {was} to {is_now} bytes")
    return found


def table(done: Sequence[Outcome]) -> str:
    """Bytes in MiB."""
    columns = [column.name for column in fields(Disk)]
    rows = [["run", "overrides", "prefect", "mlflow", "ran", "version", "s", *columns, "left", "wrong"]]
    for number, outcome in enumerate(done, 1):
        record = outcome.record
        ran = [stage for stage, how in record.stages.items() if how == "ran"]
        rows.append(
            [
                str(number),
                " ".join(f"{name.partition('.')[2]}={value}" for name, value in outcome.planned.overrides.items()),
                record.prefect.lower(),
                " ".join(record.mlflow).lower(),
                f"{len(ran)} of {len(record.stages)}",
                {"registered": "new ", "already registered": "old "}.get(record.register, "")
                + (record.version or record.register or "-"),
                f"{outcome.seconds:.0f}",
                *(f"{getattr(outcome.disk, name) / 2**20:.2f}" for name in columns),
                str(len(outcome.orphans) + len(outcome.files)),
                "; ".join(outcome.wrong) or "-",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def figures(done: Sequence[Outcome]) -> dict[str, object]:
    """What it comes to, with every run."""
    disks = [outcome.disk for outcome in done]
    return {
        "runs": len(done),
        "correct_records": sum(not outcome.wrong for outcome in done),
        "orphans": sum(len(outcome.orphans) for outcome in done),
        "temporary_files": sum(len(outcome.files) for outcome in done),
        "still_growing": growth(done) if len(done) >= ENOUGH else None,
        "median_seconds": statistics.median(outcome.seconds for outcome in done),
        "largest_bytes": {name: max(getattr(disk, name) for disk in disks) for name in BOUNDED},
        "kept_bytes_a_run": {name: getattr(disks[-1], name) // len(done) for name in ("notes", "records")},
        "each": [asdict(outcome) for outcome in done],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=ENOUGH, help=f"fewer than {ENOUGH} do not tell what grows")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="finercut-soak-") as folder,
        servers.postgres(("mlflow", "prefect")) as postgres,
        servers.s3(Path(folder)) as store,
        servers.mlflow_server(Path(folder), postgres.uri("mlflow", driver="postgresql+psycopg"), store) as mlflow,
        servers.prefect_server(Path(folder), postgres.uri("prefect", driver="postgresql+asyncpg")) as prefect,
    ):
        # Prefect reads the environment when it is imported.
        os.environ |= {"MLFLOW_TRACKING_URI": mlflow, "PREFECT_API_URL": prefect}
        os.environ |= {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        done = _soak(Path(folder), store, plan(given.runs))
    print(table(done))
    print(json.dumps(figures(done)))
    wrong = [problem for outcome in done for problem in outcome.wrong + outcome.orphans + outcome.files]
    if given.runs >= ENOUGH:
        wrong += growth(done)
    if wrong:
        sys.exit("\n".join(wrong))


def _soak(folder: Path, store: servers.S3, planned: Sequence[Planned]) -> list[Outcome]:
    from test_end_to_end import NAME

    root = folder / "clone"
    site = Site(root, folder / "worker", store, NAME)
    settings = _make_clone(folder, root)
    environment = os.environ | {"PYTHONPATH": str(root)} | site.environment
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "finercut", "--install-policy", "never"]
    # One at a time, so that they come in the plan's order: of runs that wait in Prefect's queue, any may be next.
    worker += ["--limit", "1"]
    with servers.running(worker, folder / "worker.log", lambda: True, env=environment, cwd=root):
        scheduled = schedule(planned, in_s=60)
        done = []
        for outcome in follow(site, scheduled, Expected(CONCERNED, STAGES, settings["collect"]["versions"])):
            print(outcome, file=sys.stderr, flush=True)
            done.append(outcome)
    return done


def _make_clone(folder: Path, root: Path) -> dict:
    """A clone of the project with a tiny model, deployed; its params."""
    import yaml
    from conftest import write_tiny
    from test_end_to_end import ROOT, make_project, tiny_settings

    settings = tiny_settings(*write_tiny(folder))
    document = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    (nightly,) = document["deployments"]
    root.mkdir()
    (root / "prefect.yaml").write_text(yaml.safe_dump(document | {"deployments": [nightly | {"schedules": []}]}))
    project = make_project(root, settings, os.environ | {"PYTHONPATH": str(root)})
    project.run(sys.executable, "-m", "pipelines.cli", "deploy")
    return settings


if __name__ == "__main__":
    main()
