"""A consumer that follows an alias, in real stores, with real processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from example_versions import ROOT, project

from finercut.registry.versions import VersionReference
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
def here(tmp_path, monkeypatch, mlflow_store, tiny_model, tiny_pruned):
    """A project whose registry is in SQLite."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return project(tmp_path, tiny_model, tiny_pruned)


@pytest.fixture
def on_server(tmp_path, monkeypatch, mlflow_server, tiny_model, tiny_pruned):
    """A project whose registry is a server."""
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


def md5(here, version):
    return here.tags(version)["finercut.pruned_md5"].partition(".")[0][:12]


def test_the_command_follows_the_alias_and_ends_with_the_watcher(on_server):
    here = on_server
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
        size = str(Path("artifacts/quantised/model.safetensors").stat().st_size)
        folders = [f"watched/{here.name}-{number}-{md5(here, number)}" for number in "12"]
        assert [first[2:], second[2:]] == [[folders[0], size], [folders[1], size]]
        assert not any(psutil.pid_exists(int(pid)) for pid in first[:2])
        wait_until(lambda: [str(path) for path in Path("watched").glob("[!.]*")] == folders[1:], watcher)
    finally:
        watcher.send_signal(signal.SIGTERM)
        said = watcher.communicate(timeout=60)[1]
    assert not any(psutil.pid_exists(int(pid)) for pid in served()[1][:2])
    assert f"cannot find {uri} in MLflow at {os.environ['MLFLOW_TRACKING_URI']}" in said
    assert "version 1 goes on" in said
    assert len(served()) == 2


def test_the_watcher_ends_when_the_command_does_with_its_status(here, handlers):
    here.register()
    reference = VersionReference(here.name, "challenger")
    assert watch.run(reference, Path("watched"), ["sh", "-c", "test -f {}/config.json && exit 7"], 60) == 7
    (folder,) = Path("watched").glob("[!.]*")
    (folder / "config.json").unlink()
    # a second start takes the files that are there
    assert watch.run(reference, Path("watched"), ["sh", "-c", "test -f {}/config.json && exit 7"], 60) == 1


def test_a_command_that_ends_during_a_download_is_not_started_again(here, handlers, monkeypatch):
    here.register()
    here.register()
    here.client.set_registered_model_alias(here.name, "served", "1")
    download = watch._download

    def slow(version, directory):
        held = download(version, directory)
        if str(version.version) == "2":
            Path("end").touch()
            time.sleep(2)
        else:
            here.client.set_registered_model_alias(here.name, "served", "2")
        return held

    monkeypatch.setattr(watch, "_download", slow)
    command = ["sh", "-c", "echo {} >> started; until test -f end; do sleep 0.1; done; exit 7"]
    assert watch.run(VersionReference(here.name, "served"), Path("watched"), command, 0.2) == 7
    assert len(Path("started").read_text().split()) == 1


def test_what_another_user_left_stops_nothing(here, handlers, monkeypatch, caplog):
    here.register()
    Path("watched").mkdir()
    Path(f"watched/.{here.name}-9-0a.lock").touch()
    monkeypatch.setattr(watch, "_discard", lambda _: (_ for _ in ()).throw(PermissionError("not yours")))
    assert watch.run(VersionReference(here.name, "challenger"), Path("watched"), ["sh", "-c", "exit 3"], 60) == 3
    assert f"watch: {here.name}-9-0a is not deleted: not yours" in caplog.text


def test_version_1_of_another_model_is_not_served_in_its_place(here, handlers):
    here.register()
    other = replace(here, params=here.params.model_copy(update={"register_": _named(here, f"{here.name}-b")}))
    Path("artifacts/quantised/README.md").write_text("of the other model")
    other.register()
    for served_by, card in ((here, None), (other, "of the other model"), (here, None)):
        command = ["sh", "-c", "cp {}/README.md card.md"]
        assert watch.run(VersionReference(served_by.name, "challenger"), Path("watched"), command, 60) == 0
        assert (Path("card.md").read_text() == card) == (card is not None)
    assert len(list(Path("watched").glob("[!.]*"))) == 2


def _named(here, name):
    return here.params.register_.model_copy(update={"name": name})


def test_two_watchers_in_one_directory_leave_each_other_their_checkpoints(here):
    here.register()
    here.register()
    for number in "12":
        here.client.set_registered_model_alias(here.name, f"at-{number}", number)
    watchers = [start(here, f"at-{number}") for number in "12"]
    try:
        wait_until(lambda: len(served()) == 2, watchers[0])
        folders = [f"watched/{here.name}-{number}-{md5(here, number)}" for number in "12"]
        assert sorted(line[2] for line in served()) == folders
        # The first one moves on to what the second one has, and its own goes.
        here.client.set_registered_model_alias(here.name, "at-1", "2")
        wait_until(lambda: len(served()) == 3, watchers[0])
        assert served()[2][2] == folders[1]
        wait_until(lambda: not Path(folders[0]).exists(), watchers[0])
        # Killed, it leaves its command, which keeps the files that it serves.
        here.client.set_registered_model_alias(here.name, "at-2", "1")
        wait_until(lambda: len(served()) == 4, watchers[1])
        watchers[0].kill()
        watchers[0].wait()
        here.client.set_registered_model_alias(here.name, "at-2", "2")
        wait_until(lambda: len(served()) == 5, watchers[1])
        here.client.set_registered_model_alias(here.name, "at-2", "1")
        wait_until(lambda: len(served()) == 6, watchers[1])
        assert psutil.pid_exists(int(served()[2][0]))
        assert all((Path(folder) / "config.json").is_file() for folder in folders)
    finally:
        for watcher in watchers:
            watcher.send_signal(signal.SIGTERM)
            watcher.communicate(timeout=60)
        for line in served():
            for pid in line[:2]:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def start(here, alias):
    uri = f"models:/{here.name}@{alias}"
    command = [sys.executable, "-m", "pipelines.cli", "watch", "--interval", "0.2", uri, "--"]
    return subprocess.Popen([*command, sys.executable, "-c", SERVER, "{}"], stderr=subprocess.DEVNULL)


def held(here, number="1"):
    version = watch.versions.find(here.client, VersionReference(here.name, number))
    return watch._download(version, Path("watched"))


def test_a_folder_that_another_watcher_deletes_meanwhile_is_downloaded_again(here):
    here.register()
    with held(here) as folder:
        pass
    lock = watch._lock_file(folder).open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)  # the other one is about to delete it
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(held, here)
        time.sleep(1)
        shutil.rmtree(folder)
        lock.close()
        with waiting.result(timeout=60) as again:
            assert (again / "config.json").is_file()


def test_what_killed_downloads_left_is_deleted_but_not_one_that_is_under_way(here):
    here.register()
    here.register()
    with held(here) as folder:
        left, under_way = (folder.with_name(f".{here.name}-{number}-0a.partial") for number in "89")
        for partial in (left, under_way):
            partial.mkdir()
            partial.with_name(partial.name.replace("partial", "lock")).touch()
        with watch._lock_file(Path("watched") / f"{here.name}-9-0a").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            watch._delete_unused(Path("watched"), here.name)
        assert [left.exists(), under_way.exists(), folder.exists()] == [False, True, True]


def test_a_command_that_is_nowhere_is_told_before_a_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no command no-such-server to run$"):
        watch.run(VersionReference("any", "champion"), tmp_path / "watched", ["no-such-server", "{}"], 60)
    assert not (tmp_path / "watched").exists()


def test_an_alias_that_is_nowhere_starts_nothing(here):
    here.register()
    with pytest.raises(RuntimeError, match=rf"^cannot find models:/{here.name}@champion in MLflow at "):
        watch.run(VersionReference(here.name, "champion"), Path("watched"), ["touch", "started"], 60)
    assert not Path("started").exists()
