"""Moves the alias `champion`: to a challenger that passes the rule, or back to a former champion.

Every decision is based on the registry: on the evidence of challenger and champion, and on the checkpoint itself, on
which the parity check is repeated where nothing but pruning changed its weights. Each decision is an entry of the log
in `finercut.registry.ledger`.
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

from . import summary
from .params import Params

logger = logging.getLogger("finercut")

# Tag of a version: why it was not promoted. Removed when it is.
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
    margins = params.promote
    checks = promotion.gate_checks(challenger, allow_limited=margins.allow_limited, **params.register_.limits)
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
    if not versions.is_finercuts(version):
        raise RuntimeError(f"{version.name} version {version.version} is not finercut's: it carries no evidence")
    with tempfile.TemporaryDirectory() as folder:
        return evidence.read(versions.download(version, "evidence", Path(folder)), str(version.version))


@dataclass(frozen=True)
class Moved:
    """The result of a promotion or a rollback."""

    message: str
    judgement: Judgement | None = None


def promote(params: Params, name: str, wanted: str, reason: str = "", dry_run: bool = False) -> Moved:
    """Make a version champion if it passes the rule; change nothing if it is champion already.

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
    challenger: Evidence | None = None
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
        challenger = challenger or read_evidence(version)
        judgement = _against_champion(params, challenger, client, name, state.champion)
        if judgement.passed and not dry_run:
            from . import recheck  # imports torch, which the figures alone do without

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


def _against_champion(
    params: Params, challenger: Evidence, client: MlflowClient, name: str, champion: str | None
) -> Judgement:
    """By the gate alone where there is no champion, or one with no figures because somebody registered it by hand."""
    if champion is None:
        return judge(params, challenger, None)
    version = versions.find(client, versions.VersionReference(name, champion))
    if versions.is_finercuts(version):
        return judge(params, challenger, read_evidence(version))
    reason = f"version {champion}, the champion, is not finercut's: it has no figures to compare with"
    logger.warning("promote: %s", reason)
    checks = judge(params, challenger, None).checks
    return Judgement(
        challenger.version, champion, [*checks, Check(name="champion", value=None, passed=True, reason=reason)]
    )


def _accept(
    ledger: Ledger, state: State, version: ModelVersion, alias: str | None, reason: str, dry_run: bool
) -> Moved:
    """Promoting the version that somebody made champion by hand accepts it without a judgement."""
    number, name = str(version.version), ledger.model
    if number != alias:
        ways = [f"accept it by `finercut promote {name} --version {alias}`"] if alias else []
        if state.champion:
            ways.append(f"undo it by `finercut rollback {name}`")
        raise RuntimeError(
            f"champion of {name} was moved to {_shown(alias)} outside finercut, its log says "
            f"{_shown(state.champion)}: {', or '.join(ways)}"
        )
    if not dry_run and ledger.append(state, "accepted", number, version.run_id, reason=reason):
        _sign(ledger.settle(), ledger)
    return Moved(f"{name} version {number} is champion already; moved outside finercut, now accepted")


def rollback(name: str, to: str | None = None, reason: str = "") -> Moved:
    """Undo the last promotion, once however often this is called; or go back to the former champion `to`.

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
        version = versions.find(client, versions.VersionReference(name, target))
        files = versions.stored(client, version) if versions.is_finercuts(version) else None
        if files is not None and not files.n_bytes(versions.CHECKPOINT):
            raise RuntimeError(f"the checkpoint of {name} version {target} was deleted: it cannot serve")
        if ledger.append(state, "rolled back", target, version.run_id, reason=reason):
            _sign(ledger.settle(), ledger)
            return Moved(f"{name} version {target} is champion again, after {_shown(alias)}")
        logger.info("rollback: someone else moved %s meanwhile; looking again", name)


def _undone(state: State, by_hand: bool) -> str | None:
    """The champion before the last promotion, or before the alias was moved by hand."""
    if by_hand or (state.move is not None and state.move.action != "promoted"):
        return state.champion
    return state.previous


def _nothing_to_undo(name: str, state: State, to: str | None) -> str:
    former = ", ".join(state.champions[:-1])
    further = f"; `--to` goes further back, to {former}" if former and to is None else ""
    return f"{name} version {state.champion} is champion already, {state.move.action} by {state.move.by}{further}"


def _sign(state: State, ledger: Ledger) -> None:
    """Tag the version with its entry in the log."""
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
