"""Kill -9 of every stage and of what drives them, many times: `make trials`.

The suite does a few of these (tests/test_faults.py). Prints a table and ends with one line of JSON. Only kills that
found their process alive are counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kill_executions
from kill_executions import EXECUTION, REGISTRATION, REPRO
from kill_stages import CHEAP, ENGINES_START, Trial, prepare, start, status, throughput_trial, trials

HEADER = ("killed", "kills", "half-written", "other bytes", "removals redone", "outlived", "left behind")


def table(done: list[Trial]) -> str:
    rows = [list(HEADER)]
    for what in dict.fromkeys(trial.what for trial in done):
        of_one = [trial for trial in done if trial.what == what]
        left = Counter(trial.left for trial in of_one)
        rows.append(
            [
                what,
                str(len(of_one)),
                str(sum(not trial.whole for trial in of_one)),
                str(sum(not trial.same for trial in of_one)),
                str(max(trial.redone for trial in of_one)),
                str(sum(trial.outlived for trial in of_one)),
                ", ".join(f"{count} {kind}" for kind, count in left.most_common()),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _make_model(folder: Path) -> None:
    from conftest import write_tiny

    write_tiny(folder)


def _told(trial: Trial) -> Trial:
    print(trial, file=sys.stderr, flush=True)
    return trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each cheap stage and of the registration")
    parser.add_argument("--driver-kills", type=int, default=10, help="of `dvc repro` and of `finercut run`")
    parser.add_argument("--throughput-kills", type=int, default=2, help="each takes minutes")
    parser.add_argument("--only", nargs="*", default=[*CHEAP, REGISTRATION, REPRO, EXECUTION])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="finercut-trials-") as folder:
        work = Path(folder)
        status(start(_make_model, work))
        prepare(work / "base", work / "model", work / "text.txt")
        drivers = {
            REGISTRATION: (kill_executions.prepare_registration, kill_executions.registration_trials, given.kills),
            EXECUTION: (kill_executions.prepare_execution, kill_executions.execution_trials, given.driver_kills),
            REPRO: (
                lambda root: kill_executions.prepare_repro(work / "base", root),
                kill_executions.repro_trials,
                given.driver_kills,
            ),
        }

        def killed(what: str) -> list[Trial]:
            root = work / what.replace(" ", "-")
            if what in drivers:
                prepare_driver, driver_trials, n = drivers[what]
                before = work / f"{root.name}-before"
                prepare_driver(before)
                found = driver_trials(before, root, n, given.seed)
            else:
                found = trials(what, work / "base", root, given.kills, given.seed)
            return [_told(trial) for trial in found]

        with ThreadPoolExecutor(max_workers=4) as pool:
            done = [trial for of_one in pool.map(killed, given.only) for trial in of_one]
        for number in range(given.throughput_kills):
            since = ENGINES_START[number % len(ENGINES_START)]
            done.append(_told(throughput_trial(work / "base", work / "throughput", since, after_s=10 + number)))
    print(table(done))
    print(json.dumps([vars(trial) for trial in done]))
    if not all(trial.same and trial.whole and trial.redone <= 1 for trial in done):
        sys.exit("not every kill was recovered from")


if __name__ == "__main__":
    main()
