"""The log of promotions: its fold by hand, its guarantees on a real MLflow store and a real server."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import mlflow
import pytest

from finercut import ledger
from finercut.ledger import Entry, Ledger, fold

ROOT = Path(__file__).parents[1]
# Promotes and rolls back at random until told to stop; prints the key of each entry of its own that counted.
MOVER = """
import random, sys
from finercut import versions
from finercut.ledger import Ledger
name, seed, run_id, n_moves = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
choose = random.Random(seed).choice
ledger = Ledger(versions.connect(name), name)
print("ready", flush=True)
sys.stdin.readline()
made = tried = 0
while made < n_moves:
    state = ledger.read()
    others = [v for v in "123" if v != state.champion]
    action, version = choose([("promoted", choose(others)), *[("rolled back", state.previous)] * bool(state.previous)])
    tried += 1
    if ledger.append(state, action, version, run_id, reason=f"{seed}.{made}"):
        made += 1
        print(f"{seed}.{made - 1}", flush=True)
    ledger.settle()
print("tried", tried, flush=True)
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


def start(book, run_id, seed, n_moves):
    command = [sys.executable, "-c", MOVER, book.model, str(seed), run_id, str(n_moves)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=-1, stdout=-1, text=True)


def test_processes_that_move_at_once_take_turns_and_none_is_told_wrong(book):
    book, run_id = book
    movers = [start(book, run_id, seed, 4) for seed in range(3)]
    for mover in movers:
        assert mover.stdout.readline() == "ready\n"
    for mover in movers:
        mover.stdin.write("\n")
        mover.stdin.flush()
    said = [mover.communicate(timeout=300)[0].split() for mover in movers]
    assert [mover.returncode for mover in movers] == [0, 0, 0]

    state = book.read()
    told = sorted(word for words in said for word in words if "." in word)
    assert sorted(e.reason for e in state.entries) == told
    assert len(told) == 12
    assert state.last == sum(int(words[-1]) for words in said)  # every attempt is an entry, also those that lost
    # each saw what the one before it had left
    assert state.entries[0].before is None
    assert all(later.before == earlier.version for earlier, later in pairwise(state.entries))
    aliases = {"champion": state.champion} | ({"previous": state.previous} if state.previous else {})
    assert book.aliases() == aliases
    assert state.move.settled


def test_a_mover_killed_at_any_moment_blocks_nobody_and_the_next_completes_its_move(book):
    book, run_id = book
    moments = random.Random(3)
    for seed in range(3):
        mover = start(book, run_id, seed, 1000)
        assert mover.stdout.readline() == "ready\n"
        mover.stdin.write("\n")
        mover.stdin.flush()
        time.sleep(moments.uniform(0.05, 0.6))
        mover.send_signal(signal.SIGKILL)
        told = [word for word in mover.communicate()[0].split() if "." in word]
        state = book.settle()
        assert set(told) <= {e.reason for e in state.entries}
        aliases = {"champion": state.champion} | ({"previous": state.previous} if state.previous else {})
        assert book.aliases() == {alias: version for alias, version in aliases.items() if version}
        assert not book.read().moved_outside(state.champion)
    champion = "1" if state.champion != "1" else "2"
    assert book.append(state, "promoted", champion, run_id)
    assert book.settle().champion == champion


def test_a_store_that_refuses_is_one_line(book, monkeypatch):
    book, run_id = book
    state = book.read()
    monkeypatch.setattr(ledger, "_SUFFIX", "/promotions")  # no name for a registered model
    with pytest.raises(RuntimeError, match=r"^cannot write to \S+/promotions in MLflow at \S+: .*") as error:
        book.append(state, "promoted", "1", run_id)
    assert "\n" not in str(error.value)
