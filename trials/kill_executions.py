"""Kill -9 of what drives the stages, the registration, DVC and `finercut run`, and what a second run makes of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import toy
import yaml
from kill_stages import CHEAP, ROOT, Trial, digest, kill_tree, kills, run, start, state, status, still_in, wait_for

REGISTRATION, REPRO, EXECUTION = "register", "dvc repro", "finercut run"
FINERCUT = [sys.executable, "-m", "pipelines.cli"]
DVC = [sys.executable, "-m", "dvc"]
# What DVC's stages read of others that are not killed.
MORE = ("environment", "costs")
RESULTS = ("artifacts", "reports/evaluate.json", "reports/throughput.json", "reports/curve.csv", "dvc.lock")


def prepare_registration(root: Path) -> None:
    """A committed repository whose toy stages have run, and an MLflow store without a run."""
    prepare_execution(root)
    subprocess.run([*DVC, "repro", "-q"], cwd=root, check=True, env=_environment(root))


def prepare_execution(root: Path) -> None:
    """A committed repository of toy stages, and an MLflow store without a run."""
    root.mkdir(parents=True, exist_ok=True)
    toy.make_toy(root=root)
    make_store = "import mlflow; mlflow.MlflowClient().search_experiments()"
    subprocess.run([sys.executable, "-c", make_store], cwd=root, check=True, env=_environment(root))


def _store(root: Path) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}


def _environment(root: Path) -> dict[str, str]:
    return os.environ | _store(root) | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(root / ".finercut" / "prefect")}


def _fresh(base: Path, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root)


def registration_trials(base: Path, root: Path, n: int, seed: int) -> Iterator[Trial]:
    """Kill the registration `n` times after it has begun to upload.

    The second run must leave one complete version, and the alias on it. `left` is the last thing that was done.
    """
    _fresh(base, root)
    seconds = run(REGISTRATION, root, since="uploading", **_store(root))
    complete = _registered(root)

    def attempt(_: int, kill_after_s: float) -> float | None:
        _fresh(base, root)
        return run(REGISTRATION, root, kill_after_s, "uploading", **_store(root))

    for _ in kills(n, f"{seed} register", seconds, attempt):
        after, reported = _registered(root), (root / "reports/register.json").exists()
        run(REGISTRATION, root, **_store(root))
        yield Trial(
            what=REGISTRATION,
            left="report" if reported else after.reached,
            same=_registered(root) == complete,
            whole=after == complete if reported else after.versions in ([], complete.versions),
        )


@dataclass(frozen=True)
class Registered:
    versions: list[str]
    """What each holds."""
    aliases: dict[str, str]
    uploaded: bool

    @property
    def reached(self) -> str:
        """How far the registration came."""
        return "alias" if self.aliases else "version" if self.versions else "upload" if self.uploaded else "nothing"


def _registered(root: Path) -> Registered:
    # In a process of its own: MLflow keeps its connection to a store, and this one is replaced between trials.
    found = root / ".finercut" / "versions.json"
    found.parent.mkdir(exist_ok=True)
    status(start(_write_registered, str(root), str(found)))
    return Registered(**json.loads(found.read_text()))


def _write_registered(root: str, file: str) -> None:
    from mlflow import MlflowClient

    from finercut.registry import versions

    client = MlflowClient(_store(Path(root))["MLFLOW_TRACKING_URI"])
    held = [
        f"{v.tags.get(versions.PRUNED_MD5)} {digest(Path(_folder(client, v)) / 'checkpoint')}"
        for v in client.search_model_versions()
    ]
    aliases = {alias: str(v) for m in client.search_registered_models() for alias, v in m.aliases.items()}
    uploads = client.search_logged_models([e.experiment_id for e in client.search_experiments()])
    Path(file).write_text(json.dumps({"versions": held, "aliases": aliases, "uploaded": bool(uploads)}))


def _folder(client, version) -> str:
    return client.get_logged_model(version.source.removeprefix("models:/")).artifact_location.removeprefix("file://")


def execution_trials(base: Path, root: Path, n: int, seed: int) -> Iterator[Trial]:
    """Kill `finercut run` after it has opened its MLflow run: every other time it alone, else all it started too."""
    _fresh(base, root)
    command, since = [*FINERCUT, "run"], "MLflow run "
    seconds = _execute(command, root, since=since)
    complete = _registered(root)
    results = _results(root)
    locked = yaml.safe_load((root / "dvc.lock").read_text())["stages"]

    def attempt(number: int, kill_after_s: float) -> float | None:
        _fresh(base, root)
        return _execute(command, root, kill_after_s, since, alone=_is_alone(number))

    for number in kills(n, f"{seed} run", seconds, attempt):
        outlived = [process for process in still_in(root, within_s=10) if not _is_prefects(process)]
        lock = root / "dvc.lock"
        vouched = yaml.safe_load(lock.read_text())["stages"] if lock.exists() else {}
        whole = all(entry == locked[name] for name, entry in vouched.items()) and not _changed(root, vouched)
        for process in still_in(root, within_s=0):
            process.kill()  # Prefect's
        _execute(command, root)
        same = _registered(root) == complete and _results(root) == results and not _changed(root, locked)
        yield Trial(
            what=f"{EXECUTION}, alone" if _is_alone(number) else EXECUTION,
            left=f"{len(vouched)} of {len(locked)} stages",
            same=same,
            whole=whole,
            outlived=len(outlived),
        )


def _is_alone(number: int) -> bool:
    """Whether a kill hits the driver and nothing that it started."""
    return number % 2 == 1


def _is_prefects(process: psutil.Process) -> bool:
    """Whether it is the server that Prefect starts where there is none."""
    try:
        return "prefect.server.api.server:create_app" in process.cmdline()
    except psutil.NoSuchProcess:
        return True


def _results(root: Path) -> dict[str, str | None]:
    return {name: digest(root / name) for name in RESULTS}


def _changed(root: Path, stages: dict) -> list[str]:
    """Of the stages, those whose inputs or outputs are not what dvc.lock says."""
    said = subprocess.run(
        [*DVC, "status", "--json"], cwd=root, env=_environment(root), capture_output=True, text=True, check=True
    )
    return sorted(set(json.loads(said.stdout)) & set(stages))


def prepare_repro(base: Path, root: Path) -> None:
    """The project of `base` with code of its own, in which DVC has run everything up to `evaluate`; its params differ
    from that in what the search is to find."""
    shutil.copytree(base, root)
    for package in ("finercut", "pipelines"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    for name in (".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root)
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    toy.write(stages={name: stages[name] for name in (*MORE, *CHEAP)}, root=root)
    toy.commit(root)
    for stage in MORE:
        subprocess.run([*FINERCUT, stage], cwd=root, check=True, env=_environment(root))
    subprocess.run([*DVC, "commit", "--force", "--quiet"], cwd=root, check=True, env=_environment(root))
    settings = yaml.safe_load((root / "params.yaml").read_text())
    settings["search"] |= {"per": None, "fill": False, "removals": 5}
    toy.write(settings, root=root)
    shutil.rmtree(root / ".finercut")


def repro_trials(base: Path, root: Path, n: int, seed: int) -> Iterator[Trial]:
    """Kill `dvc repro` while it runs the search: every other time it alone, else the stage too."""
    command, since = [*DVC, "repro", "--single-item", "search"], "Running stage 'search'"
    _fresh(base, root)
    earlier = state(root, "search")
    seconds = _execute(command, root, since=since)
    complete, lock = state(root, "search"), _lock(root)

    def attempt(number: int, kill_after_s: float) -> float | None:
        _fresh(base, root)
        return _execute(command, root, kill_after_s, since, alone=_is_alone(number))

    for number in kills(n, f"{seed} repro", seconds, attempt):
        outlived = still_in(root, within_s=1)
        psutil.wait_procs(outlived, timeout=300)  # the second run would be told to wait
        after = state(root, "search")
        found = {None if digest is None else digest in (earlier[p], complete[p]) for p, digest in after.items()}
        left = "nothing" if found == {None} else "complete" if after == complete else "some"
        whole = False not in found and _lock(root) in (_lock(base), lock)
        _execute(command, root)
        yield Trial(
            what=f"{REPRO}, alone" if _is_alone(number) else REPRO,
            left=left,
            same=state(root, "search") == complete and _lock(root) == lock,
            whole=whole,
            outlived=len(outlived),
        )


def _lock(root: Path) -> dict:
    """What dvc.lock says, but for the hash of the search's report, which tells how long it took."""
    stages = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    report = "reports/search.json"
    stages["search"]["outs"] = [out for out in stages["search"]["outs"] if out["path"] != report]
    return stages


def _execute(
    command: list[str], root: Path, kill_after_s: float | None = None, since: str = "", alone: bool = False
) -> float | None:
    """As `kill_stages.run`, of a command; `alone`, the process is killed and nothing that it started."""
    log = root / ".finercut" / "execution.log"
    log.parent.mkdir(exist_ok=True)
    environment = _environment(root) | ({"PYTHONPATH": str(root)} if (root / "pipelines").exists() else {})
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    wait_for(since, log, lambda: process.poll() is None)
    started = time.monotonic()
    try:
        process.wait(kill_after_s)
    except subprocess.TimeoutExpired:
        if alone:
            process.kill()
        else:
            kill_tree(process.pid)
        process.wait()
    if process.returncode == -signal.SIGKILL:
        return None
    if process.returncode:
        raise RuntimeError(f"{command} failed: {log.read_text()[-2000:]}")
    return time.monotonic() - started
