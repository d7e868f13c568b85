"""A consumer that follows an alias, on a real server, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from example_versions import ROOT, project

from finercut.registry.versions import Reference
from pipelines import watch

# What a served model looks like from outside: it holds a child, and says who both are and what it was given.
SERVER = """
import os, pathlib, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
weights = pathlib.Path(sys.argv[1], "model.safetensors").stat().st_size
with open("served.txt", "a") as file:
    print(os.getpid(), child.pid, sys.argv[1], weights, file=file)
child.wait()
"""


@pytest.fixture
def here(tmp_path, monkeypatch, mlflow_server, tiny_model, tiny_pruned):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return project(tmp_path, tiny_model, tiny_pruned)


@pytest.fixture
def handlers():
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def wait_until(holds, process, within_s=120):
    deadline = time.monotonic() + within_s
    while not holds() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holds()


def served():
    path = Path("served.txt")
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_the_command_follows_the_alias_and_ends_with_the_watcher(here):
    for _ in range(2):
        here.register()
    here.client.set_registered_model_alias(here.name, "champion", "1")
    uri = f"models:/{here.name}@champion"
    command = [sys.executable, "-m", "pipelines.cli", "watch", "--interval", "0.2", uri, "--"]
    watcher = subprocess.Popen([*command, sys.executable, "-c", SERVER, "{}"], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(served()) == 1, watcher)
        here.client.delete_registered_model_alias(here.name, "champion")  # nothing to follow: what runs goes on
        time.sleep(1)
        assert len(served()) == 1
        here.client.set_registered_model_alias(here.name, "champion", "2")
        wait_until(lambda: len(served()) == 2, watcher)
        first, second = served()
        size = str(Path("artifacts/pruned/model.safetensors").stat().st_size)
        assert [first[2:], second[2:]] == [["watched/1", size], ["watched/2", size]]
        assert not any(psutil.pid_exists(int(pid)) for pid in first[:2])
        wait_until(lambda: [path.name for path in Path("watched").iterdir()] == ["2"], watcher)
    finally:
        watcher.send_signal(signal.SIGTERM)
        said = watcher.communicate(timeout=60)[1]
    assert not any(psutil.pid_exists(int(pid)) for pid in served()[1][:2])
    assert f"cannot find {uri} in MLflow at {os.environ['MLFLOW_TRACKING_URI']}" in said
    assert "version 1 goes on" in said
    assert len(served()) == 2


def test_the_watcher_ends_when_the_command_does_with_its_status(here, handlers):
    here.register()
    reference = Reference(here.name, "challenger")
    assert watch.run(reference, Path("watched"), ["sh", "-c", "test -f {}/config.json && exit 7"], 60) == 7
    (Path("watched") / "1" / "config.json").unlink()
    # a second start takes the files that are there
    assert watch.run(reference, Path("watched"), ["sh", "-c", "test -f {}/config.json && exit 7"], 60) == 1


def test_an_alias_that_is_nowhere_starts_nothing(here):
    here.register()
    with pytest.raises(RuntimeError, match=rf"^cannot find models:/{here.name}@champion in MLflow at "):
        watch.run(Reference(here.name, "champion"), Path("watched"), ["touch", "started"], 60)
    assert not Path("started").exists()
