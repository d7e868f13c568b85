"""What `finercut status` prints: the champion and who promoted it, why other versions fail, and what was refused."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from finercut.registry import versions
from finercut.registry.evidence import Evidence
from finercut.registry.ledger import CHAMPION, PREVIOUS, Ledger, State
from finercut.registry.server import mlflow_errors

from . import promote, summary
from .params import Params

N_VERSIONS, N_MOVES, N_REFUSED = 10, 10, 5


def text(params: Params, name: str) -> str:
    """
    Raises:
        RuntimeError: there is no such registered model, or no registry that answers.
    """
    client = versions.connect(name)
    ledger = Ledger(client, name)
    (state, champion), aliases = ledger.look(), ledger.aliases()
    sections = [
        f"# {name}",
        _headline(state, champion),
        _versions(params, client, name, state, aliases),
        _moves(state),
        _refused(client, params.flow.experiment, name),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _headline(state: State, alias: str | None) -> str:
    at = f"version {alias}" if alias else "no version"
    if state.moved_outside(alias):
        logged = f"version {state.champion}" if state.champion else "no version"
        return f"Champion: {at}, moved there outside finercut; the log says {logged}"
    if state.champion is None:
        return "Champion: none"
    # Not simply the last move, whose version may have been deleted since.
    move = next(entry for entry in reversed(state.entries) if entry.version == state.champion and entry.moves)
    because = f": {move.reason}" if move.reason else ""
    headline = f"Champion: version {move.version}, {move.action} {_time(move.at)} by {move.by}{because}"
    if alias != state.champion:
        return f"{headline}\n\nThe alias is still at {at}: the command was interrupted; the next one completes it"
    return headline


def _versions(params: Params, client: MlflowClient, name: str, state: State, aliases: dict[str, str]) -> str:
    listed = versions.every(client, name)
    champion = aliases.get(CHAMPION)
    shown = [v for i, v in enumerate(listed) if i < N_VERSIONS or str(v.version) in (champion, aliases.get(PREVIOUS))]
    best = next((_evidence(v)[0] for v in shown if str(v.version) == champion), None)
    rows = []
    for version in shown:
        number = str(version.version)
        evidence, problem = _evidence(version)
        standing = problem or _standing(params, evidence, best, number, state, version)
        named = ", ".join(sorted(alias for alias, at in aliases.items() if at == number))
        rows.append([number, named, _time(_created(version.creation_timestamp)), *_figures(evidence), standing])
    header = ["version", "aliases", "registered", "retention", "perplexity", "speed-up", "standing"]
    left_out = len(listed) - len(shown)
    return summary.table(header, rows) + (f"\n\n{left_out} older versions" if left_out else "")


def _evidence(version: ModelVersion) -> tuple[Evidence | None, str]:
    try:
        return promote.read_evidence(version), ""
    except (RuntimeError, ValueError, OSError) as error:
        return None, str(error)


def _figures(evidence: Evidence | None) -> list[str]:
    if evidence is None:
        return ["", "", ""]
    retention = evidence.evaluate.mean_retention
    return [
        "-" if retention is None else f"{100 * retention:.1f} %",
        f"x {evidence.evaluate.perplexity_ratio:.2f}",
        f"x {evidence.throughput.speed_up:.2f}",
    ]


def _standing(
    params: Params, evidence: Evidence, best: Evidence | None, number: str, state: State, version: ModelVersion
) -> str:
    collected = "checkpoint collected; " if number in state.collected else ""
    is_champion = best is not None and best.version == number
    judgement = promote.judge(params, evidence, None if is_champion else best)
    if not judgement.passed:
        return f"{collected}fails: {judgement.failures}"
    if promote.REFUSED in version.tags:
        return f"{collected}refused {version.tags[promote.REFUSED]}"
    passed = "passes the gate" if is_champion or best is None else "passes the gate and the comparison"
    return collected + passed


def _moves(state: State) -> str:
    rows = [
        [str(e.number), _time(e.at), e.action, e.version, e.before or "-", e.by, e.reason]
        for e in reversed(state.entries)
        if e.moves
    ]
    header = ["entry", "when", "what", "version", "before", "by", "why"]
    return summary.table(header, rows[:N_MOVES]) if rows else ""


def _refused(client: MlflowClient, experiment: str, name: str) -> str:
    """Executions for `name` whose model did not pass the gate; they have no version."""
    wanted = f"tags.gate = 'refused' AND params.`register.name` = '{name}'"
    with mlflow_errors(f"look for runs of {experiment}"):
        found = client.get_experiment_by_name(experiment)
        runs: Iterable = found and client.search_runs([found.experiment_id], wanted, max_results=N_REFUSED)
    lines = []
    for run in runs or ():
        tags = run.data.tags
        reason = tags.get("gate.reason") or tags.get("failure", "")  # as earlier versions noted it
        lines.append(f"- {_time(_created(run.info.start_time))}, run {run.info.run_id}: {reason}")
    return "\n".join(["Executions the gate refused:", "", *lines]) if lines else ""


def _created(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"
