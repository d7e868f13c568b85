"""Kill -9 of a stage at random moments: what it leaves, and what a second run makes of it.

The suite does a few of these; `make trials` does many, prints a table and ends with one line of JSON. Everything is
real but the size of the model. Stages are forked from a process that has imported them, so that the moments fall into
their work and not into their imports.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[1]
DECLARED = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
CHEAP = ("fetch", "calibrate", "search", "prune", "evaluate")
# What a report says of how long something took, or of how often it was started; everything else is compared.
TIMINGS = {
    "search": {"seconds", "resumed_after"},
    "throughput": {"output_tokens_per_s", "ttft_s", "tpot_s", "speed_up"},
    "register": {"run_id", "status"},
}
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([f"pipelines.{stage}" for stage in (*CHEAP, "register")])


def outputs(stage: str) -> list[Path]:
    """Everything the stage writes, its report last."""
    declared = [*DECLARED[stage].get("outs", []), *DECLARED[stage].get("metrics", [])]
    return sorted(map(Path, declared), key=lambda path: path.name == f"{stage}.json")


def digest(path: Path, timings: frozenset[str] | set[str] = frozenset()) -> str | None:
    """Of a file or of a directory with its names; of a report without its timings. None if there is nothing."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        content = b"".join(f"{p.relative_to(path)}\n".encode() + p.read_bytes() for p in files)
    elif not path.is_file():
        return None
    elif path.suffix == ".json" and timings:
        content = json.dumps(_without(json.loads(path.read_bytes()), timings)).encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()


def _without(value: object, names: frozenset[str] | set[str]) -> object:
    if isinstance(value, dict):
        return {key: _without(inside, names) for key, inside in value.items() if key not in names}
    return value


def state(root: Path, stage: str) -> dict[Path, str | None]:
    return {path: digest(root / path, TIMINGS.get(stage, set())) for path in outputs(stage)}


def _work(stage: str, root: str, log: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(root)
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from finercut import params

    # The removals a search announces are what its second run must not make again.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    importlib.import_module(f"pipelines.{stage}").run(params.load())


def run(stage: str, root: Path, kill_after_s: float | None = None, **environment: str) -> float | None:
    """Run a stage in a process group of its own, to its end or until it is killed.

    Returns:
        seconds it took; None if it was killed.
    """
    log = root / ".finercut" / f"{stage}.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("")
    process = _forks.Process(target=_work, args=(stage, str(root), str(log), environment))
    started = time.monotonic()
    process.start()
    process.join(kill_after_s)
    if process.exitcode is None:
        kill_tree(process.pid)
        process.join()
        return None
    if process.exitcode:
        raise RuntimeError(f"{stage} failed: {log.read_text()[-2000:]}")
    return time.monotonic() - started


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all below it, as the machine's out-of-memory killer or an impatient operator would."""
    try:
        tree = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def prepare(root: Path, model: Path, text: Path) -> None:
    """A project in `root` in which everything up to `evaluate` has run, for a budget of 2; its params say 3."""
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["fetch"]["source"] = {"kind": "local", "path": str(model)}
    settings["calibrate"] |= {"source": {"kind": "files", "paths": [str(text)]}, "n_samples": 4, "n_tokens": 32}
    settings["calibrate"] |= {"n_held_out_samples": 2}
    settings["search"] |= {"removals": 6, "dtype": "float32", "device": "cpu"}
    settings["prune"]["budget"] = {"unit": "sublayers", "amount": 3}
    settings["evaluate"] |= {
        "tasks": [{"name": "finercut_agreement", "metric": "acc", "limit": 20}],
        "device": "cpu",
        "dtype": "float32",
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    for stage in CHEAP:
        run(stage, root)


# What makes a stage's output another one: (section, field, value).
OTHER = {
    "fetch": ("fetch", "source", None),
    "calibrate": ("calibrate", "shuffle_seed", 7),
    "search": ("search", "removals", 4),
    "prune": ("prune", "budget", {"unit": "sublayers", "amount": 2}),
    "evaluate": ("evaluate", "seed", 99),
}


@dataclass(frozen=True)
class Trial:
    stage: str
    finished: bool
    """Before it was to be killed."""
    left: str
    """What was under the names of its outputs after the kill: nothing, earlier, complete, or some of them."""
    same: bool
    """Byte for byte, after the second run, what an undisturbed run gives."""
    whole: bool
    """Nothing was half-written, and no report vouched for what it does not describe."""
    redone: int
    """Removals made twice."""


def trials(stage: str, base: Path, root: Path, n: int, seed: int) -> Iterator[Trial]:
    """Kill `stage` `n` times, at moments spread over its work, with and without an earlier output in its place."""
    draw = random.Random(f"{seed} {stage}")
    _fresh(base, root, stage)
    seconds = run(stage, root)
    complete = state(root, stage)
    for number in range(n):
        _fresh(base, root, stage)
        if number % 2:
            _earlier_output(stage, root)
        earlier = state(root, stage)
        moment = seconds * (number + draw.random()) / n
        finished = run(stage, root, kill_after_s=moment) is not None
        after = state(root, stage)
        found = _removals_found(root) if stage == "search" else 0
        announced = (root / ".finercut" / f"{stage}.log").read_text().count("removed ") if stage == "search" else 0
        run(stage, root)
        yield Trial(
            stage=stage,
            finished=finished,
            left=_left(after, earlier, complete),
            same=state(root, stage) == complete,
            whole=_whole(stage, after, earlier, complete),
            redone=max(0, announced - found),
        )


def _fresh(base: Path, root: Path, stage: str) -> None:
    """`base` less what `stage` wrote."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    shutil.rmtree(root / ".finercut", ignore_errors=True)
    for path in outputs(stage):
        if (root / path).is_dir():
            shutil.rmtree(root / path)
        else:
            (root / path).unlink(missing_ok=True)


def _earlier_output(stage: str, root: Path) -> None:
    """Run `stage` with other settings first, and put the settings back."""
    file = root / "params.yaml"
    before = file.read_text()
    settings = yaml.safe_load(before)
    section, field, value = OTHER[stage]
    if stage == "fetch":
        other = root / ".finercut" / "other"
        shutil.copytree(settings["fetch"]["source"]["path"], other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
        value = {"kind": "local", "path": str(other)}
    settings[section][field] = value
    file.write_text(yaml.safe_dump(settings))
    run(stage, root)
    file.write_text(before)
    if stage == "search":
        shutil.rmtree(root / ".finercut")


def _removals_found(root: Path) -> int:
    """Complete lines of the search in progress, after that of provenance."""
    files = list((root / ".finercut" / "search").glob("*/trajectory.jsonl"))
    return sum(max(file.read_text().count("\n") - 1, 0) for file in files)


States = dict[Path, str | None]


def _left(after: States, earlier: States, complete: States) -> str:
    kinds = {
        "nothing" if found is None else "complete" if found == complete[path] else "earlier"
        for path, found in after.items()
    }
    return kinds.pop() if len(kinds) == 1 else "some"


def _whole(stage: str, after: States, earlier: States, complete: States) -> bool:
    every_one = all(found in (None, earlier[path], complete[path]) for path, found in after.items())
    report = Path("reports") / f"{stage}.json"
    # A report says that the stage's work is done: then everything else must be of the same run.
    vouched = after[report] is None or after == (complete if after[report] == complete[report] else earlier)
    return every_one and vouched


def table(done: list[Trial]) -> str:
    rows = [["stage", "kills", "left nothing", "earlier", "some", "complete", "half-written", "other bytes", "redone"]]
    for stage in dict.fromkeys(trial.stage for trial in done):
        of_stage = [trial for trial in done if trial.stage == stage]
        left = Counter(trial.left for trial in of_stage)
        counts = [
            len(of_stage),
            *(left[kind] for kind in ("nothing", "earlier", "some", "complete")),
            sum(not trial.whole for trial in of_stage),
            sum(not trial.same for trial in of_stage),
            max(trial.redone for trial in of_stage),
        ]
        rows.append([stage, *map(str, counts)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


REGISTRATION = "register"


def prepare_registration(root: Path) -> None:
    """A committed repository whose toy stages have run, and an MLflow store without a run."""
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    shutil.copy(ROOT / ".dvcignore", root)
    (root / ".gitignore").write_text("/artifacts/\n/reports/\n/.finercut/\n/mlruns/\n/mlflow.db\n")
    (root / "speed_up.txt").write_text("1.25")
    shutil.copy(ROOT / "params.yaml", root)
    toy = f"{sys.executable} {ROOT / 'tests' / 'example_reports.py'}"
    stages = {
        "prune": {
            "cmd": f"{toy} model",
            "outs": ["artifacts/pruned", "reports/curve.csv"],
            "metrics": [f"reports/{name}.json" for name in ("fetch", "calibrate", "search", "prune")],
        },
        "evaluate": {
            "cmd": f"{toy} evaluate",
            "deps": ["artifacts/pruned"],
            "metrics": ["reports/parity.json", "reports/evaluate.json"],
        },
        "throughput": {
            "cmd": f"{toy} throughput",
            "deps": ["reports/parity.json", "speed_up.txt"],
            "metrics": ["reports/throughput.json"],
        },
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    make_store = "import mlflow; mlflow.MlflowClient().search_experiments()"
    for command in (
        ["git", "init", "-q"],
        ["git", "add", "-A"],
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "toy"],
        [sys.executable, "-m", "dvc", "repro", "-q"],
        [sys.executable, "-c", make_store],
    ):
        subprocess.run(command, cwd=root, check=True, env=os.environ | _store(root) | {"PYTHONPATH": str(ROOT)})


def _store(root: Path) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}


def registration_trials(base: Path, root: Path, n: int, seed: int) -> Iterator[Trial]:
    """Kill the registration `n` times. The second run must leave one complete version, and the alias on it."""
    draw = random.Random(f"{seed} register")
    report = root / "reports" / "register.json"

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root)

    fresh()
    seconds = run(REGISTRATION, root, **_store(root))
    complete = _versions(root)
    for number in range(n):
        fresh()
        finished = run(REGISTRATION, root, seconds * (number + draw.random()) / n, **_store(root)) is not None
        whole = not report.exists() or _versions(root) == complete
        left = "complete" if report.exists() else "some" if _versions(root) else "nothing"
        run(REGISTRATION, root, **_store(root))
        yield Trial(REGISTRATION, finished, left, same=_versions(root) == complete, whole=whole, redone=0)


def _versions(root: Path) -> list[str]:
    """What the versions that count hold: those with the alias or with the tag that is set last."""
    # In a process of its own: MLflow keeps its connection to a store, and this one is replaced between trials.
    found = root / ".finercut" / "versions.json"
    found.parent.mkdir(exist_ok=True)
    reader = _forks.Process(target=_write_versions, args=(str(root), str(found)))
    reader.start()
    reader.join()
    return json.loads(found.read_text())


def _write_versions(root: str, file: str) -> None:
    from mlflow import MlflowClient

    from finercut import registry

    client = MlflowClient(_store(Path(root))["MLFLOW_TRACKING_URI"])
    versions = [client.get_model_version(v.name, v.version) for v in client.search_model_versions()]
    counting = [v for v in versions if v.aliases or registry.PRUNED_MD5 in v.tags]
    held = [
        f"{v.aliases} {v.tags.get(registry.PRUNED_MD5)} {digest(Path(_folder(client, v)) / 'checkpoint')}"
        for v in counting
    ]
    Path(file).write_text(json.dumps(held))


def _folder(client, version) -> str:
    return client.get_logged_model(version.source.removeprefix("models:/")).artifact_location.removeprefix("file://")


def throughput_trial(base: Path, root: Path, after_s: float) -> Trial:
    """Kill the process that measures, and it alone: its engines must end by themselves."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    settings = yaml.safe_load((root / "params.yaml").read_text())
    settings["throughput"] |= {"input_tokens": 8, "output_tokens": 8, "concurrency": 2, "n_rounds": 2}
    settings["throughput"] |= {"max_model_len": 64, "kv_cache_gib": 0.05, "dtype": "float32"}
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "pipelines.cli", "throughput"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.DEVNULL)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 60
    while (left := _processes_in(root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    nothing = state(root, "throughput") == {Path("reports/throughput.json"): None}
    subprocess.run(command, cwd=root, env=environment, stderr=subprocess.DEVNULL, check=True)
    again = state(root, "throughput")
    subprocess.run(command, cwd=root, env=environment, stderr=subprocess.DEVNULL, check=True)
    same = state(root, "throughput") == again
    return Trial("throughput", False, "nothing" if nothing else "complete", same, whole=nothing and not left, redone=0)


def _processes_in(root: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(root):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _make_model(folder: Path) -> None:
    from conftest import write_tiny

    write_tiny(folder)


def _told(trial: Trial) -> Trial:
    print(trial, file=sys.stderr, flush=True)
    return trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each cheap stage and of the registration")
    parser.add_argument("--throughput-kills", type=int, default=2, help="each takes minutes")
    parser.add_argument("--stages", nargs="*", default=[*CHEAP, REGISTRATION])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="finercut-trials-") as folder:
        work = Path(folder)
        made = _forks.Process(target=_make_model, args=(work,))
        made.start()
        made.join()
        prepare(work / "base", work / "model", work / "text.txt")
        if REGISTRATION in given.stages:
            prepare_registration(work / "registration")

        def killed(stage: str) -> list[Trial]:
            if stage == REGISTRATION:
                found = registration_trials(work / "registration", work / stage, given.kills, given.seed)
            else:
                found = trials(stage, work / "base", work / stage, given.kills, given.seed)
            return [_told(trial) for trial in found]

        with ThreadPoolExecutor() as pool:
            done = [trial for of_stage in pool.map(killed, given.stages) for trial in of_stage]
        for number in range(given.throughput_kills):
            done.append(_told(throughput_trial(work / "base", work / "throughput", 20 + 25 * number)))
    print(table(done))
    print(json.dumps([vars(trial) for trial in done]))
    if not all(trial.same and trial.whole and trial.redone <= 1 for trial in done):
        sys.exit("not every kill was recovered from")


if __name__ == "__main__":
    main()
