"""Kill -9 of single stages at random moments: what it leaves, and what a second run makes of it.

Everything is real but the size of the model. Stages are forked from a process that has imported them, so that the
moments fall into their work and not into their imports.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import yaml
from toy import ROOT

DECLARED = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
CHEAP = ("fetch", "calibrate", "search", "prune", "heal", "quantise", "evaluate_whole", "evaluate")
# What a report says of how long something took, or of how often it was started; everything else is compared.
TIMINGS = {
    "search": {"seconds", "resumed_after"},
    "throughput": {"output_tokens_per_s", "ttft_s", "tpot_s", "speed_up"},
    "register": {"run_id", "status"},
}
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [f"pipelines.{stage}" for stage in (*(set(CHEAP) - {"heal", "quantise"}), "register", "steps")]
)

# Starting a process asks all others for their status, which each tells once: a thread must not ask meanwhile.
_one_at_a_time = threading.Lock()


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
    from finercut.serving import vllm_engine
    from pipelines import cli_stages, params

    # `fetch` would wait for vLLM's import most of its time, and write nothing meanwhile.
    vllm_engine.find_spec = lambda name: None
    # The removals a search announces are what its second run must not make again.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cli_stages.runner(stage)(params.load())


def run(stage: str, root: Path, kill_after_s: float | None = None, since: str = "", **environment: str) -> float | None:
    """Run a stage in a process group of its own, to its end or until it is killed.

    Args:
        kill_after_s: counted from the moment it has logged `since`.

    Returns:
        seconds it took, from the same moment; None if it was killed.
    """
    log = root / ".finercut" / f"{stage}.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("")
    process = start(_work, stage, str(root), str(log), environment)
    wait_for(since, log, lambda: status(process, 0) is None)
    started = time.monotonic()
    if (code := status(process, kill_after_s)) is None:
        kill_tree(process.pid)
        code = status(process)
    if code == -signal.SIGKILL:
        return None
    if code:
        raise RuntimeError(f"{stage} failed ({code}): {log.read_text()[-2000:]}")
    return time.monotonic() - started


def start(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Fork a process that has everything imported."""
    with _one_at_a_time:
        process = _forks.Process(target=work, args=arguments)
        process.start()
    return process


def status(process: BaseProcess, within_s: float | None = None) -> int | None:
    """What a process ended with; None if it has not, within the time."""
    deadline = time.monotonic() + (math.inf if within_s is None else within_s)
    while True:
        with _one_at_a_time:
            code = process.exitcode
        if code is not None or time.monotonic() >= deadline:
            return code
        time.sleep(0.005)


def wait_for(text: str, log: Path, alive: Callable[[], bool]) -> None:
    """Until the file has it; or until nobody is left to write it."""
    while text not in log.read_text() and alive():
        time.sleep(0.005)


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
    settings["calibrate"] |= {"n_held_out_samples": 2, "n_healing_samples": 0, "sources": None, "unseen": None}
    settings["search"] |= {"mode": "exact", "per": None, "fill": False, "removals": 6}
    settings["search"] |= {"dtype": "float32", "device": "cpu", "continuation_tokens": 4}
    settings["heal"] = {"method": "none"}
    settings["prune"]["budget"] = {"unit": "sublayers", "amount": 3}
    settings["throughput"]["max_model_len"] = 256  # all that the model takes
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
    "heal": ("heal", "method", "none"),  # there is no other
    "quantise": ("quantise", "method", "none"),
    "evaluate_whole": ("evaluate", "seed", 99),
    "evaluate": ("evaluate", "samples", {"prompts": ["The river rises in"], "n_tokens": 4}),
}


@dataclass(frozen=True)
class Trial:
    """A kill that found its process alive."""

    what: str
    left: str
    """What was under the names of its outputs after the kill: nothing, earlier, complete, or some of them."""
    same: bool
    """Byte for byte, after the second run, what an undisturbed run gives."""
    whole: bool
    """Nothing was half-written, and no report vouched for what it does not describe."""
    redone: int = 0
    """Removals that were begun twice, at most."""
    outlived: int = 0
    """Processes that went on after the one that was killed."""


def kills(n: int, seed: str, seconds: float, attempt: Callable[[int, float], float | None]) -> Iterator[int]:
    """Kill `n` times, once in each n-th of an undisturbed run; yields the number of each when it has happened.

    Args:
        seconds: that an undisturbed run takes
        attempt: makes the run of a number and kills it after so many seconds; gives how long it took if it had ended by
            then, and is made again
    """
    draw = random.Random(seed)
    for number in range(n):
        moment = (number + draw.random()) / n
        while (ended_after := attempt(number, moment * seconds)) is not None:
            seconds = ended_after
        yield number


def trials(stage: str, base: Path, root: Path, n: int, seed: int) -> Iterator[Trial]:
    """Kill `stage` `n` times, at moments spread over its work, with and without an earlier output in its place."""
    _fresh(base, root, stage)
    seconds = run(stage, root)
    complete, earlier = state(root, stage), {}

    def attempt(number: int, kill_after_s: float) -> float | None:
        nonlocal earlier
        _fresh(base, root, stage)
        if number % 2:
            _earlier_output(stage, root)
        earlier = state(root, stage)
        return run(stage, root, kill_after_s)

    for _ in kills(n, f"{seed} {stage}", seconds, attempt):
        after = state(root, stage)
        announced = (root / ".finercut" / f"{stage}.log").read_text().count("removed ")
        run(stage, root)
        yield Trial(
            what=stage,
            left=_left(after, earlier, complete),
            same=state(root, stage) == complete,
            whole=_whole(stage, after, earlier, complete),
            redone=_redone(announced, root) if stage == "search" else 0,
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


def _redone(announced: int, root: Path) -> int:
    """Those the killed search had announced and the second did not take over, and the one under way at the kill."""
    report = json.loads((root / "reports/search.json").read_bytes())
    return max(0, min(announced + 1, report["n_removals"]) - report["resumed_after"])


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


# What the stage logs while vLLM starts once more: one engine for the comparison, then two that are timed.
ENGINES_START = ("throughput: model, vLLM", "throughput: pruned, vLLM")


def throughput_trial(base: Path, root: Path, since: str, after_s: float) -> Trial:
    """Kill the process that measures, and it alone, so long after it has logged `since`: its engines must end too."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)
    settings = yaml.safe_load((root / "params.yaml").read_text())
    settings["throughput"] |= {"input_tokens": 8, "output_tokens": 8, "concurrency": 2, "n_rounds": 2}
    settings["throughput"] |= {"max_model_len": 64, "kv_cache_gib": 0.05, "dtype": "float32"}
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "pipelines.cli", "throughput"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    log = root / ".finercut" / "throughput.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=root, env=environment, stderr=file)
    wait_for(since, log, lambda: process.poll() is None)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"throughput ended within {after_s} s, with status {process.returncode}")
    outlived = still_in(root, within_s=60)
    nothing = state(root, "throughput") == {Path("reports/throughput.json"): None}
    subprocess.run(command, cwd=root, env=environment, stderr=subprocess.DEVNULL, check=True)
    again = state(root, "throughput")
    subprocess.run(command, cwd=root, env=environment, stderr=subprocess.DEVNULL, check=True)
    same = state(root, "throughput") == again
    return Trial("throughput", "nothing" if nothing else "complete", same, whole=nothing, outlived=len(outlived))


def still_in(root: Path, within_s: float) -> list[psutil.Process]:
    """The processes that work in a directory after so long."""
    deadline = time.monotonic() + within_s
    while (found := _processes_in(root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _processes_in(root: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(root):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
