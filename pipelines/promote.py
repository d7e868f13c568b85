"""Move the alias `champion`: to a challenger that the rule lets through, or back.

Everything that decides is read from the registry: the evidence of challenger and champion, and the checkpoint itself,
on which the parity check is repeated. What is decided is an entry of the log in `finercut.registry.ledger`.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from finercut.registry import evidence, promotion, versions
from finercut.registry.evidence import Evidence
from finercut.registry.ledger import Ledger, State
from finercut.registry.records import Check
from finercut.registry.server import mlflow_errors

from . import recheck, summary
from .params import Params

logger = logging.getLogger("finercut")

# Why a version was not promoted, on the version; gone when it is.
REFUSED = "promotion.refused"


@dataclass(frozen=True)
class Judgement:
    """A challenger beside the champion."""

    challenger: str
    champion: str | None
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> str:
        return "; ".join(check.reason for check in self.checks if not check.passed)


class NotPromoted(RuntimeError):
    """The challenger does not become champion."""

    def __init__(self, message: str, judgement: Judgement | None = None) -> None:
        super().__init__(message)
        self.judgement = judgement


def judge(params: Params, challenger: Evidence, champion: Evidence | None) -> Judgement:
    """By the limits of the gate and the margins of the rule in `params`."""
    limits, margins = params.register_, params.promote
    checks = promotion.gate_checks(
        challenger,
        allow_limited=margins.allow_limited,
        min_retention=limits.min_retention,
        min_speed_up=limits.min_speed_up,
        max_perplexity_ratio=limits.max_perplexity_ratio,
    )
    if champion is not None:
        checks += promotion.compare(
            challenger,
            champion,
            max_retention_drop=margins.max_retention_drop,
            max_perplexity_rise=margins.max_perplexity_rise,
            max_speed_up_drop=margins.max_speed_up_drop,
        )
    return Judgement(challenger.version, champion and champion.version, checks)


def read_evidence(version: ModelVersion) -> Evidence:
    """
    Raises:
        RuntimeError, ValueError: the version carries none, or it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        return evidence.read(versions.download(version, "evidence", Path(folder)), str(version.version))


@dataclass(frozen=True)
class Moved:
    """The result of a promotion or a rollback."""

    message: str
    judgement: Judgement | None = None


def promote(params: Params, name: str, wanted: str, reason: str = "", dry_run: bool = False) -> Moved:
    """Make a version champion if the rule lets it through; at once, done already, or not at all.

    Args:
        wanted: a version's number, or an alias
        dry_run: compare only; nothing is downloaded but the evidence, nothing is written

    Raises:
        NotPromoted: with a reason for each check that failed; it is recorded on the version.
        RuntimeError: no such version, or the alias was moved outside finercut.
        ValueError: a version's evidence cannot be read.
    """
    client = versions.connect(name)
    version = versions.find(client, versions.VersionReference(name, wanted))
    ledger, number = Ledger(client, name), str(version.version)
    challenger = read_evidence(version)
    proof: list[Check] = []
    while True:
        state, alias = ledger.look() if dry_run else ledger.settled()
        if state.moved_outside(alias):
            return _accept(ledger, state, version, alias, reason, dry_run)
        if state.champion == number:
            return Moved(f"{name} version {number} is already champion")
        if number in state.collected:
            raise NotPromoted(
                f"the checkpoint of {name} version {number} was collected: compress again to have it back"
            )
        judgement = judge(params, challenger, _champion(client, name, state))
        if judgement.passed and not dry_run:
            proof = proof or recheck.files(params, version, challenger)
            judgement = replace(judgement, checks=[*judgement.checks, *proof])
        if not judgement.passed:
            if not dry_run:
                _record_refusal(ledger, version, judgement)
            raise NotPromoted(_verdict(name, judgement), judgement)
        if dry_run:
            return Moved(_verdict(name, judgement), judgement)
        details = summary.comparison(judgement.checks)
        if ledger.append(state, "promoted", number, version.run_id, reason=reason, details=details):
            _sign(ledger.settle(), ledger)
            return Moved(f"{name} version {number} is champion, after {_shown(state.champion)}", judgement)
        logger.info("promote: someone else moved %s meanwhile; comparing again", name)


def _champion(client: MlflowClient, name: str, state: State) -> Evidence | None:
    if state.champion is None:
        return None
    return read_evidence(versions.find(client, versions.VersionReference(name, state.champion)))


def _accept(
    ledger: Ledger, state: State, version: ModelVersion, alias: str | None, reason: str, dry_run: bool
) -> Moved:
    """Promoting what someone made champion by hand takes their word for it."""
    number, name = str(version.version), ledger.model
    if number != alias:
        accept = f"accept it by `finercut promote {name} --version {alias}`, or " if alias else ""
        raise RuntimeError(
            f"champion of {name} was moved to {_shown(alias)} outside finercut, its log says "
            f"{_shown(state.champion)}: {accept}undo it by `finercut rollback {name}`"
        )
    if not dry_run and ledger.append(state, "accepted", number, version.run_id, reason=reason):
        _sign(ledger.settle(), ledger)
    return Moved(f"{name} version {number} is champion already; moved outside finercut, now accepted")


def rollback(name: str, to: str | None = None, reason: str = "") -> Moved:
    """Undo the last promotion, once however often it is asked for; or go back to the former champion `to`.

    Raises:
        RuntimeError: there is nothing to go back to.
    """
    client = versions.connect(name)
    ledger = Ledger(client, name)
    while True:
        state, alias = ledger.settled()
        by_hand = state.moved_outside(alias)
        target = to or _undone(state, by_hand)
        if target is None or (to is not None and to not in state.champions):
            former = ", ".join(state.champions[:-1]) or "none"
            raise RuntimeError(f"{name} has no version {to or 'before this one'} to go back to; former: {former}")
        if target == alias:
            return Moved(_nothing_to_undo(name, state, to))
        if target in state.collected:
            raise RuntimeError(f"the checkpoint of {name} version {target} was collected: it cannot serve")
        run_id = versions.find(client, versions.VersionReference(name, target)).run_id
        if ledger.append(state, "rolled back", target, run_id, reason=reason):
            _sign(ledger.settle(), ledger)
            return Moved(f"{name} version {target} is champion again, after {_shown(alias)}")
        logger.info("rollback: someone else moved %s meanwhile; looking again", name)


def _undone(state: State, by_hand: bool) -> str | None:
    """Where the champion was before the last promotion, or before it was moved by hand."""
    if by_hand or (state.move is not None and state.move.action != "promoted"):
        return state.champion
    return state.previous


def _nothing_to_undo(name: str, state: State, to: str | None) -> str:
    former = ", ".join(state.champions[:-1])
    further = f"; `--to` goes further back, to {former}" if former and to is None else ""
    return f"{name} version {state.champion} is champion already, {state.move.action} by {state.move.by}{further}"


def _sign(state: State, ledger: Ledger) -> None:
    """On the version itself, who moved the champion there; the log has it anyway."""
    move = state.move
    text = f"{move.at:%Y-%m-%d %H:%M} UTC, {move.action} by {move.by}, from {_shown(move.before)}"
    signed = f"{text}: {move.reason}" if move.reason else text
    with mlflow_errors(f"tag {ledger.model} version {move.version}"):
        ledger.client.set_model_version_tag(ledger.model, move.version, "promotion", signed)
        ledger.client.set_model_version_tag(
            ledger.model, move.version, "promotion.entry", f"{ledger.name} {move.number}"
        )
        if REFUSED in ledger.client.get_model_version(ledger.model, move.version).tags:
            ledger.client.delete_model_version_tag(ledger.model, move.version, REFUSED)


def _record_refusal(ledger: Ledger, version: ModelVersion, judgement: Judgement) -> None:
    against = f"against version {judgement.champion}: " if judgement.champion else ""
    with mlflow_errors(f"tag {ledger.model} version {version.version}"):
        ledger.client.set_model_version_tag(
            ledger.model, str(version.version), REFUSED, f"{against}{judgement.failures}"
        )


def _verdict(name: str, judgement: Judgement) -> str:
    who = f"{name} version {judgement.challenger}"
    if judgement.passed:
        return f"{who} may take the place of {_shown(judgement.champion)}"
    return f"{who} does not take the place of {_shown(judgement.champion)}: {judgement.failures}"


def _shown(version: str | None) -> str:
    return f"version {version}" if version else "no version"
