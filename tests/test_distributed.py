"""A search shared by processes that torch's launcher starts, against the same search in one process."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import pytest
import torch
import yaml
from conftest import random_llama
from servers import open_to_others
from stage_project import settings

from finercut.selection.distributed import Ranks, start
from finercut.selection.greedy import search
from finercut.selection.records import SearchReport
from finercut.sources.records import FetchReport
from finercut.tokens import Tokens, write_tokens
from pipelines import paths
from pipelines import search as stage

N_REMOVALS = 8
COMMAND = [sys.executable, "-m", "pipelines.cli", "search"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Threads of one process in place of processes: what they gather is the same."""

    box: list | None = None
    barrier: threading.Barrier | None = None

    def gather(self, value):
        self.box[self.rank] = value
        self.barrier.wait()
        values = list(self.box)
        self.barrier.wait()
        return values


@pytest.mark.parametrize("size", [2, 3])
def test_all_find_the_removals_that_one_finds(tokens, size):
    alone = list(search(random_llama(), tokens[:4], tokens[4:], 5))
    box, barrier = [None] * size, threading.Barrier(size, timeout=300)
    with ThreadPoolExecutor(size) as threads:
        everyone = [ThreadRanks(rank, size, 0, box, barrier) for rank in range(size)]
        models = [random_llama() for _ in everyone]  # as processes have: one each
        runs = threads.map(lambda m, ranks: list(search(m, tokens[:4], tokens[4:], 5, ranks=ranks)), models, everyone)
        assert list(runs) == [alone] * size


def test_more_processes_than_calibration_windows_are_refused(tokens):
    with pytest.raises(ValueError, match="4 calibration windows cannot be shared by 5 processes"):
        next(search(random_llama(), tokens[:4], tokens[4:], 1, ranks=Ranks(0, 5)))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory in which fetch and calibrate have run, with steps long enough to be killed in the middle of one."""
    directory = tmp_path_factory.mktemp("project")
    random_llama(num_hidden_layers=8, max_position_embeddings=512).save_pretrained(directory / paths.MODEL)
    windows = torch.randint(3, 400, (6, 256), generator=torch.Generator().manual_seed(1))
    (directory / paths.CALIBRATION).mkdir()
    write_tokens(directory / paths.CALIBRATION, Tokens(windows[:4].clone(), windows[4:].clone()), {})
    FetchReport(
        source="tiny",
        revision="1",
        sha256="0" * 64,
        model_type="llama",
        n_blocks=8,
        n_parameters=1,
        weights_bytes=1,
        dtype="float32",
        vocab_size=400,
        max_position_embeddings=512,
    ).write(directory / paths.report("fetch"))
    return directory


def with_processes(n_processes, removals=N_REMOVALS):
    """Write params.yaml; what it says."""
    chosen = settings(**{"search.removals": removals, "search.n_processes": n_processes})
    with open("params.yaml", "w") as file:
        yaml.safe_dump(chosen.model_dump(mode="json", by_alias=True), file)
    return chosen


@pytest.fixture(scope="module")
def alone(project):
    """The bytes of an undisturbed search in one process."""
    before = os.getcwd()
    os.chdir(project)
    try:
        stage.run(with_processes(1))
        return paths.TRAJECTORY.read_bytes()
    finally:
        os.chdir(before)


@pytest.fixture
def fresh(project, alone, monkeypatch):
    """The project as it is before a search; commands run in it take the same number of threads."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    shutil.rmtree(paths.WORK, ignore_errors=True)
    for file in (paths.TRAJECTORY, paths.report("search"), paths.CURVE, paths.CURVE_PICTURE):
        file.unlink(missing_ok=True)


def of_params(capfd):
    """Two processes that the stage starts, with the params that it was given: params.yaml says otherwise."""
    chosen = with_processes(2)
    with_processes(1, removals=3)
    stage.run(chosen)
    return capfd.readouterr().err


def of_torchrun(capfd):
    """Three, which share four windows."""
    with_processes(1)
    done = subprocess.run([*TORCHRUN, "-m", "pipelines.cli", "search"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("processes", [of_params, of_torchrun])
def test_two_and_three_processes_write_the_bytes_of_one(fresh, alone, capfd, processes):
    told = processes(capfd)
    assert paths.TRAJECTORY.read_bytes() == alone
    assert told.count(f"search: {N_REMOVALS}/{N_REMOVALS} removed") == 1, "the first alone logs"
    assert SearchReport.read(paths.report("search")).resumed_after == 0


def test_a_killed_process_ends_the_search_and_what_was_found_is_kept(fresh, alone):
    chosen = with_processes(2)
    launcher = subprocess.Popen(COMMAND, stderr=subprocess.PIPE, text=True)
    workers = _workers_after(launcher, n_removals=2)
    workers["1"].send_signal(signal.SIGKILL)
    _, told = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert told.rstrip().endswith(
        "finercut search: process 1 of 2 was ended by SIGKILL; what was found is kept: run it again to continue"
    )
    assert not paths.TRAJECTORY.exists()
    psutil.wait_procs(workers.values(), timeout=0)

    launcher = subprocess.Popen(COMMAND, stderr=subprocess.DEVNULL)
    workers = _workers_after(launcher, n_removals=4)
    assert open_to_others(psutil.Process(launcher.pid)) == []
    launcher.kill()
    launcher.wait()
    _, outlived = psutil.wait_procs(workers.values(), timeout=60)
    assert not outlived, "nobody is left to go on beside the next search"

    report = stage.run(chosen.model_copy(update={"search": chosen.search.model_copy(update={"n_processes": 1})}))
    assert 4 <= report.resumed_after < N_REMOVALS
    assert paths.TRAJECTORY.read_bytes() == alone


def _workers_after(launcher, n_removals):
    """The processes of a search, by LOCAL_RANK, as soon as so many removals are found."""
    deadline = time.monotonic() + 300
    while True:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        found = list(paths.WORK.rglob(paths.TRAJECTORY.name))
        if found and found[0].read_bytes().count(b"\n") > n_removals:
            children = psutil.Process(launcher.pid).children(recursive=True)
            return {child.environ()["LOCAL_RANK"]: child for child in children if "LOCAL_RANK" in child.environ()}
        time.sleep(0.01)


def test_processes_whose_launcher_was_killed_before_they_joined_do_not_search(fresh):
    with_processes(2)
    launcher = subprocess.Popen(COMMAND, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(workers := [c for c in psutil.Process(launcher.pid).children() if "LOCAL_RANK" in c.environ()]) < 2:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    _, outlived = psutil.wait_procs(workers, timeout=300)
    assert not outlived
    assert not list(paths.WORK.rglob(paths.TRAJECTORY.name))
    assert not paths.TRAJECTORY.exists()


def test_the_environment_is_as_before_when_the_processes_have_ended(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    told = "import os, sys; sys.exit(os.environ['GLOO_SOCKET_IFNAME'] != 'lo' or 3 * int(os.environ['RANK']))"
    with pytest.raises(RuntimeError, match=r"process 1 of 2 failed \(3\)"):
        start(2, ["-c", told])
    assert dict(os.environ) == before
