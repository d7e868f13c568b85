"""The log of promotions: its fold by hand, its guarantees on a real MLflow store and a real server."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import psutil
import pytest

from finercut.registry import ledger
from finercut.registry.ledger import Entry, Ledger, fold
from pipelines import status

ROOT = Path(__file__).parents[1]
# Forks movers, so that they cost no imports: each waits for a file, then promotes and rolls back at random, and writes
# to another file its every entry that counted.
NURSERY = """
import os, random, signal, sys, time
from pathlib import Path
from finercut.registry import versions
from finercut.registry.ledger import Ledger

def move(name, seed, run_id, n_moves, go, out):
    choose = random.Random(seed).choice
    while not go.exists():
        time.sleep(0.01)
    ledger = Ledger(versions.connect(name), name)
    made = tried = 0
    while made < n_moves:
        state = ledger.read()
        others = [v for v in "123" if v != state.champion]
        back = [("rolled back", state.previous)] * (state.previous is not None)
        tried += 1
        if ledger.append(state, *choose([("promoted", choose(others)), *back]), run_id, reason=f"{seed}.{made}"):
            print(f"{seed}.{made}", file=out, flush=True)
            made += 1
        ledger.settle()
    print("tried", tried, file=out, flush=True)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    uri, name, seed, run_id, n_moves, go, out = line.split()
    child = os.fork()
    if child == 0:
        os.environ["MLFLOW_TRACKING_URI"] = uri
        with open(out, "w") as told:
            os.dup2(told.fileno(), 2)
            try:
                move(name, int(seed), run_id, int(n_moves), Path(go), told)
            finally:
                told.flush()
        os._exit(0)
    print(child, flush=True)
"""


def entry(number, after, action="promoted", version="1", settled=True):
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Entry(number, after, f"key-{number}", action, version, None, "me@here", "", at, settled)


def test_an_entry_counts_only_if_none_came_between_it_and_the_last_its_writer_saw():
    state = fold(
        [entry(1, 0, version="1"), entry(2, 1, version="2"), entry(3, 1, version="3"), entry(4, 3, version="4")]
    )
    assert [e.number for e in state.entries] == [1, 2, 4]  # 3 was written on the state that 2 had already changed
    assert state.champions == ("1", "2", "4")
    assert (state.last, state.champion, state.previous) == (4, "4", "2")


def test_the_order_in_which_entries_are_listed_does_not_matter():
    entries = [entry(1, 0), entry(2, 1, version="2"), entry(3, 1, version="3")]
    assert fold(reversed(entries)) == fold(entries)


def test_an_entry_that_was_deleted_by_hand_blocks_nothing():
    state = fold([entry(1, 0), entry(4, 1, version="2")])
    assert state.champions == ("1", "2")


def test_an_empty_log_knows_no_champion():
    state = fold([])
    assert (state.last, state.champion, state.previous, state.move) == (0, None, None, None)


def test_rollbacks_take_promotions_off_the_way_back():
    moves = [("promoted", "1"), ("promoted", "2"), ("promoted", "3"), ("rolled back", "2"), ("promoted", "4")]
    state = fold(entry(i + 1, i, *move) for i, move in enumerate(moves))
    assert state.champions == ("1", "2", "4")
    state = fold(entry(i + 1, i, *move) for i, move in enumerate([*moves, ("rolled back", "1")]))
    assert state.champions == ("1",)


def test_a_version_that_was_champion_before_can_be_promoted_again():
    state = fold(entry(i + 1, i, version=v) for i, v in enumerate("121"))
    assert (state.champion, state.previous) == ("1", "2")


def test_what_was_accepted_is_champion_and_a_former_one_is_a_step_back():
    assert fold([entry(1, 0, version="1"), entry(2, 1, "accepted", "7")]).champions == ("1", "7")
    steps = [entry(1, 0, version="1"), entry(2, 1, version="2"), entry(3, 2, "accepted", "1")]
    assert fold(steps).champions == ("1",)


def test_collecting_moves_nothing():
    state = fold([entry(1, 0, version="1"), entry(2, 1, "collected", "9")])
    assert (state.champion, state.collected, state.move.number) == ("1", {"9"}, 1)


def test_an_alias_elsewhere_is_a_strangers_only_when_no_move_of_ours_is_unfinished():
    assert not fold([entry(1, 0, version="1")]).moved_outside("1")
    assert fold([entry(1, 0, version="1")]).moved_outside("2")
    assert fold([entry(1, 0, version="1")]).moved_outside(None)
    assert fold([]).moved_outside("1")
    assert not fold([]).moved_outside(None)
    assert not fold([entry(1, 0, version="1"), entry(2, 1, version="2", settled=False)]).moved_outside("1")


@pytest.fixture(params=["sqlite", "server"])
def store(request, monkeypatch, tmp_path):
    """MLFLOW_TRACKING_URI at a store in SQLite, and at a server."""
    if request.param == "sqlite":
        return request.getfixturevalue("mlflow_store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("mlflow_server"))
    monkeypatch.chdir(tmp_path)
    return os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture
def book(store, request):
    """The ledger of a model of three versions, and the run that made them."""
    mlflow.set_tracking_uri(store)
    client = mlflow.MlflowClient()
    name = f"{request.node.originalname}-{os.getpid()}"
    experiment = client.get_experiment_by_name("ledger")
    run = client.create_run(experiment.experiment_id if experiment else client.create_experiment("ledger"))
    client.create_registered_model(name)
    for _ in range(3):
        client.create_model_version(name, f"runs:/{run.info.run_id}/x", run.info.run_id)
    return Ledger(client, name), run.info.run_id


def test_the_aliases_follow_the_log(book):
    book, run_id = book
    assert book.append(book.read(), "promoted", "1", run_id, reason="first", details="| a |")
    assert book.aliases() == {}
    state = book.settle()
    assert book.aliases() == {"champion": "1"}
    assert book.append(state, "promoted", "2", run_id)
    assert book.settle().move.settled is False  # as it was read; noted since
    assert book.read().move.settled
    assert book.aliases() == {"champion": "2", "previous": "1"}
    assert book.append(book.read(), "rolled back", "1", run_id)
    book.settle()
    assert book.aliases() == {"champion": "1"}
    first = book.read().entries[0]
    assert (first.action, first.version, first.before, first.reason) == ("promoted", "1", None, "first")
    assert "@" in first.by
    assert abs((datetime.now(UTC) - first.at).total_seconds()) < 600
    assert book.client.get_model_version(book.name, "1").description == "| a |"


def test_of_two_entries_on_the_same_state_the_first_counts_and_the_other_writer_is_told(book):
    book, run_id = book
    state = book.read()
    assert book.append(state, "promoted", "1", run_id)
    assert not book.append(state, "promoted", "2", run_id)
    assert book.settle().champion == "1"
    assert book.aliases() == {"champion": "1"}


def test_who_set_an_older_champion_late_sets_the_newer_one_right_again(book):
    book, run_id = book
    book.append(book.read(), "promoted", "1", run_id)
    book.append(book.read(), "promoted", "2", run_id)
    book.settle()
    book.client.set_registered_model_alias(book.model, "champion", "1")  # a slow writer of entry 1 wakes up
    book.settle()
    assert book.aliases() == {"champion": "2", "previous": "1"}


@pytest.fixture(scope="module")
def nursery():
    command = [sys.executable, "-c", NURSERY]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=-1, stdout=-1, text=True
    ) as parent:
        yield parent
        parent.stdin.close()


@pytest.fixture
def movers(nursery, book, tmp_path):
    """Starts processes that move the champion, all at once; gives their pids and what they write."""
    book, run_id = book

    def start(seeds, n_moves):
        go, started = tmp_path / f"go-{seeds[0]}", []
        for seed in seeds:
            out = tmp_path / f"out-{seed}"
            uri = os.environ["MLFLOW_TRACKING_URI"]
            print(uri, book.model, seed, run_id, n_moves, go, out, file=nursery.stdin, flush=True)
            started.append((int(nursery.stdout.readline()), out))
        go.touch()
        return started

    return start


def wait_until(holds, within_s=300):
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert holds()


def told(out):
    """The moves that count, as their maker was told; a database's warnings may stand between them."""
    return re.findall(r"^\d\.\d+$", out.read_text(), re.MULTILINE)


def tried(out):
    """How many attempts it came to, if it came to its end."""
    return [int(n) for n in re.findall(r"^tried (\d+)$", out.read_text(), re.MULTILINE)]


def expected_aliases(state):
    return {"champion": state.champion} | ({"previous": state.previous} if state.previous else {})


def test_processes_that_move_at_once_take_turns_and_none_is_told_wrong(book, movers):
    book, _ = book
    started = movers(range(3), 4)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid, _ in started))
    outs = [out for _, out in started]
    state = book.read()
    n_tried = [n for out in outs for n in tried(out)]
    assert len(n_tried) == 3, [out.read_text() for out in outs]
    assert sorted(e.reason for e in state.entries) == sorted(word for out in outs for word in told(out))
    assert len(state.entries) == 12
    assert state.last >= sum(n_tried)  # attempts that lost are entries that do not count
    # each saw what the one before it had left
    assert state.entries[0].before is None
    assert all(later.before == fold(state.entries[: i + 1]).champion for i, later in enumerate(state.entries[1:]))
    assert book.aliases() == expected_aliases(state)
    assert state.move.settled


def test_a_mover_killed_at_any_moment_blocks_nobody_and_the_next_completes_its_move(book, movers):
    book, run_id = book
    moments = random.Random(3)
    for seed in range(4):
        ((pid, out),) = movers([seed], 1000)
        wait_until(lambda out=out: out.exists() and told(out))
        time.sleep(moments.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not psutil.pid_exists(pid))
        state = book.settle()
        assert set(told(out)) <= {e.reason for e in state.entries}
        assert book.aliases() == expected_aliases(state)
        assert book.read().move.settled
    assert book.append(state, "promoted", "1" if state.champion != "1" else "2", run_id)


def test_a_store_that_refuses_is_one_line(book, monkeypatch):
    book, run_id = book
    state = book.read()
    monkeypatch.setattr(ledger, "_SUFFIX", "/promotions")  # no name for a registered model
    with pytest.raises(RuntimeError, match=r"^cannot write to \S+/promotions in MLflow at \S+: .*") as error:
        book.append(state, "promoted", "1", run_id)
    assert "\n" not in str(error.value)


def test_versions_that_somebody_else_made_are_passed_over_with_a_warning(mlflow_store, caplog):
    client = mlflow.MlflowClient()
    client.create_registered_model("mixed")
    log = Ledger(client, "mixed")
    run_id = client.create_run("0").info.run_id
    for number in "12":
        client.create_model_version("mixed", f"runs:/{run_id}/x", run_id)
        assert log.append(log.read(), "promoted", number, run_id)
        client.create_model_version(log.name, f"runs:/{run_id}/x", run_id, tags={"after": "soon"})
    assert log.read().champions == ("1", "2")
    assert f"{log.name} has versions that are no entries of the log: 2, 4" in caplog.text
    log.settle()
    assert log.aliases() == {"champion": "2", "previous": "1"}
    assert caplog.text.count("no entries of the log: 2, 4") == 1  # however often a command reads it


def test_an_action_that_this_version_does_not_know_moves_no_champion(mlflow_store):
    _, log, run_id = model_of("newer", n_versions=2)
    assert log.append(log.read(), "promoted", "1", run_id)
    assert not log.append(log.read(), "tried out", "2", run_id)
    assert log.append(log.read(), "promoted", "2", run_id)
    assert log.read().champions == ("1", "2")


def model_of(name, n_versions):
    client = mlflow.MlflowClient()
    client.create_registered_model(name)
    run_id = client.create_run("0").info.run_id
    for _ in range(n_versions):
        client.create_model_version(name, f"runs:/{run_id}/x", run_id)
    return client, Ledger(client, name), run_id


def test_a_former_champion_that_was_deleted_is_no_step_and_no_alias(mlflow_store):
    client, log, run_id = model_of("deleted", n_versions=4)
    for number in "1234":
        assert log.append(log.read(), "promoted", number, run_id)
    log.settle()
    client.delete_model_version("deleted", "2")
    assert log.read().champions == ("1", "3", "4")
    assert log.append(log.read(), "rolled back", "3", run_id)
    log.settle()
    assert log.aliases() == {"champion": "3", "previous": "1"}
    client.delete_model_version("deleted", "1")
    log.settle()
    assert log.aliases() == {"champion": "3"}
    client.delete_model_version("deleted", "3")  # the champion: nobody is
    state, alias = log.settled()
    assert (state.champion, alias, state.moved_outside(alias)) == (None, None, False)
    assert log.append(state, "promoted", "4", run_id)
    log.settle()
    assert log.aliases() == {"champion": "4"}


def test_the_status_tells_of_the_move_that_made_the_champion_not_of_one_whose_version_was_deleted():
    made = fold([entry(1, 0, version="1"), entry(2, 1, "accepted", version="2"), entry(3, 2, "collected", version="1")])
    assert status._headline(made, "2").startswith("Champion: version 2, accepted ")
    assert status._headline(replace(made, champions=("1",)), "1").startswith("Champion: version 1, promoted ")


def test_a_version_that_no_run_made_can_be_in_the_log(book):
    book, _ = book
    book.client.create_model_version(book.model, "s3://somewhere/else")
    assert book.append(book.read(), "accepted", "4", None)
    assert book.settle().champion == "4"
    assert book.aliases() == {"champion": "4"}
