"""An append-only log of promotions in MLflow's registry, and the aliases that follow it.

MLflow sets aliases unconditionally: of two promotions at once the later write wins, whatever state it was decided on.
But MLflow numbers the versions of a registered model consecutively and never uses a number twice. So `NAME.promotions`
is a registered model whose versions are the entries of a log. An entry counts only if no other entry was written
between it and the last one that its writer had read: of two entries written on the same state the first counts, and
the writer of the second reads the log again. The log decides; the aliases `champion` and `previous` are set from it
afterwards, by any command that finds them out of date.
"""

from __future__ import annotations

import getpass
import logging
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal, get_args

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from finercut.registry.server import mlflow_errors

logger = logging.getLogger("finercut")

CHAMPION, PREVIOUS = "champion", "previous"
Action = Literal["promoted", "rolled back", "accepted", "collected"]
_SUFFIX = ".promotions"
_SETTLED = "settled"
# What MLflow says when the database refuses a row that came twice, or is locked by another.
_COLLISIONS = {"BAD_REQUEST", "TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR"}
N_ATTEMPTS = 6


@dataclass(frozen=True)
class Entry:
    """One line of the log."""

    number: int
    """Assigned by the registry."""
    after: int
    """The number of the last entry that its writer had read."""
    key: str
    """Random; its writer finds the entry by it."""
    action: Action
    version: str
    """That became champion; or, where collected, whose checkpoint is deleted."""
    before: str | None
    """The champion until then."""
    by: str
    reason: str
    at: datetime
    """By the registry's clock."""
    settled: bool
    """Whether the aliases were found to agree with it."""

    @property
    def moves(self) -> bool:
        """Whether it made a version champion."""
        return self.action != "collected"


@dataclass(frozen=True)
class State:
    """The state that the log describes."""

    last: int
    """Number of its last entry, whether it counts or not."""
    entries: tuple[Entry, ...]
    """Those that count, in order."""
    champions: tuple[str, ...]
    """Versions that a rollback can return to; the champion last."""
    collected: frozenset[str]
    """Versions whose checkpoint is no longer kept."""

    @property
    def champion(self) -> str | None:
        return self.champions[-1] if self.champions else None

    @property
    def previous(self) -> str | None:
        return self.champions[-2] if len(self.champions) > 1 else None

    @property
    def move(self) -> Entry | None:
        """The last entry that made a version champion."""
        return next((e for e in reversed(self.entries) if e.moves), None)

    def moved_outside(self, alias: str | None) -> bool:
        """Whether the alias `champion`, now at version `alias`, was moved by something that does not write the log."""
        unfinished = self.move is not None and not self.move.settled
        return alias != self.champion and not unfinished


def fold(listed: Iterable[Entry]) -> State:
    """The state after these entries, which may be in any order."""
    last, entries, champions, collected = 0, [], [], set()
    for entry in sorted(listed, key=lambda e: e.number):
        counts = entry.after >= last
        last = entry.number
        if not counts:
            continue
        entries.append(entry)
        if entry.action == "collected":
            collected.add(entry.version)
        elif entry.action != "promoted" and entry.version in champions:
            # A return to a former champion: those after it are no longer steps to go back through.
            while champions[-1] != entry.version:
                champions.pop()
        else:
            champions.append(entry.version)
    return State(last, tuple(entries), tuple(champions), frozenset(collected))


@dataclass(frozen=True)
class Ledger:
    """The log of the registered model `model`, and its aliases."""

    client: MlflowClient
    model: str

    @property
    def name(self) -> str:
        return self.model + _SUFFIX

    def read(self) -> State:
        """The state of the log, without former champions that have been deleted from the registry."""
        with mlflow_errors(f"read {self.name}"):
            listed = self.client.search_model_versions(f"name = '{self.name}'")
        entries = {int(version.version): _entry(version) for version in listed}
        if foreign := sorted(number for number, entry in entries.items() if entry is None):
            _warn_of_foreign(self.name, tuple(foreign))
        state = fold(entry for entry in entries.values() if entry is not None)
        if not state.champions:
            return state
        with mlflow_errors(f"list the versions of {self.model}"):
            kept = {str(version.version) for version in self.client.search_model_versions(f"name = '{self.model}'")}
        return replace(state, champions=tuple(version for version in state.champions if version in kept))

    def aliases(self) -> dict[str, str]:
        """The aliases of the registered model, each with its version."""
        with mlflow_errors(f"read the aliases of {self.model}"):
            return {a: str(v) for a, v in self.client.get_registered_model(self.model).aliases.items()}

    def look(self) -> tuple[State, str | None]:
        """The state of the log, and the version with the alias `champion`.

        If the two differ, both are read again: another command may be between its entry and the alias, or have moved
        the alias between the two reads.
        """
        for pause_s in (0.25, 0.5, 0):
            state, alias = self.read(), self.aliases().get(CHAMPION)
            if not state.moved_outside(alias):
                break
            time.sleep(pause_s)
        return state, alias

    def append(
        self, state: State, action: Action, version: str, run_id: str | None, *, reason: str = "", details: str = ""
    ) -> bool:
        """Write an entry that counts only if the log is still as in `state`.

        Args:
            run_id: of the run that made the version; a version made by hand may have none
            details: Markdown, shown in MLflow as the entry's description

        Returns:
            whether it counts
        """
        key = uuid.uuid4().hex
        tags = {
            "after": str(state.last),
            "key": key,
            "action": action,
            "version": version,
            "before": state.champion or "",
            "by": f"{getpass.getuser()}@{socket.gethostname()}",
            "reason": reason,
        }
        with mlflow_errors(f"write to {self.name}"):
            self._create()
            # An entry and its tags are one transaction. Of two entries with one key the first counts.
            _retrying_collisions(
                self.client.create_model_version,
                self.name,
                source=f"runs:/{run_id}/reports" if run_id else f"models:/{self.model}/{version}",
                run_id=run_id,
                tags=tags,
                description=details[:5000],
                await_creation_for=0,
            )
        return any(entry.key == key for entry in self.read().entries)

    def _create(self) -> None:
        about = f"Which version of {self.model} was champion when. Written by finercut; the aliases follow it."
        try:
            self.client.create_registered_model(self.name, description=about)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def settled(self) -> tuple[State, str | None]:
        """As `look`, after completing a move that was interrupted."""
        state = self.read()
        if state.move is not None and not state.move.settled:
            self.settle()
        return self.look()

    def settle(self) -> State:
        """Set the aliases from the log, read both again until they agree, and mark the last move as settled."""
        while True:
            state, found = self.read(), self.aliases()
            wanted = {PREVIOUS: state.previous, CHAMPION: state.champion}
            wrong = {alias: version for alias, version in wanted.items() if found.get(alias) != version}
            if not wrong:
                if state.move is not None and not state.move.settled:
                    with mlflow_errors(f"write to {self.name}"):
                        number = str(state.move.number)
                        _retrying_collisions(self.client.set_model_version_tag, self.name, number, _SETTLED, "true")
                return state
            with mlflow_errors(f"move the aliases of {self.model}"):
                for alias, version in wrong.items():
                    if version is None:
                        self.client.delete_registered_model_alias(self.model, alias)
                    else:
                        _retrying_collisions(self.client.set_registered_model_alias, self.model, alias, version)


def _retrying_collisions(write: Callable[..., object], *arguments: object, **settings: object) -> None:
    """MLflow can refuse one of two simultaneous writes of one thing: it reads first, then inserts."""
    for attempt in range(N_ATTEMPTS):
        try:
            write(*arguments, **settings)
            return
        except MlflowException as error:
            if error.error_code not in _COLLISIONS or attempt == N_ATTEMPTS - 1:
                raise
        time.sleep(random.uniform(0, 0.1 * 2**attempt))


@lru_cache
def _warn_of_foreign(name: str, numbers: tuple[int, ...]) -> None:
    """Once in each process: a command reads the log many times."""
    logger.warning("%s has versions that are no entries of the log: %s", name, ", ".join(map(str, numbers)))


def _entry(version: ModelVersion) -> Entry | None:
    """None for a version that is no entry of this log."""
    tags = version.tags
    if tags.get("action") not in get_args(Action):
        return None
    try:
        return Entry(
            number=int(version.version),
            after=int(tags["after"]),
            key=tags["key"],
            action=tags["action"],
            version=tags["version"],
            before=tags["before"] or None,
            by=tags["by"],
            reason=tags["reason"],
            at=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
            settled=_SETTLED in tags,
        )
    except (KeyError, ValueError):
        return None
