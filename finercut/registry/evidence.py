"""The measurements stored with a registered version, in the `evidence/` that it carries.

A version may be older or younger than this finercut: only what promotion and the repeated checks need has to be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from finercut.checkpoint.records import Claim, ParityReport, ProveReport, Pruned
from finercut.evaluation.records import Evaluation
from finercut.serving.records import Speed
from finercut.sources.records import HeldOut, WholeModel
from finercut.sources.settings import Fetch
from finercut.system import yaml_files
from finercut.system.records import Record

_Kind = TypeVar("_Kind", bound=Record)


@dataclass(frozen=True)
class Evidence:
    """The reports of one version."""

    version: str
    sha256: str
    """Of the checkpoint's weights."""
    claims: tuple[Claim, ...]
    evaluate: Evaluation
    throughput: Speed
    calibrate: HeldOut
    prune: Pruned
    fetch: WholeModel


def read(directory: Path, version: str) -> Evidence:
    """
    Args:
        directory: the version's downloaded `evidence/`

    Raises:
        ValueError: a report is missing, or lacks what is needed.
    """
    pruned = _report(directory, "prune", Pruned, version)
    sha256, claims = _proof(directory, version, pruned)
    return Evidence(
        version=version,
        sha256=sha256,
        claims=claims,
        evaluate=_report(directory, "evaluate", Evaluation, version),
        throughput=_report(directory, "throughput", Speed, version),
        calibrate=_report(directory, "calibrate", HeldOut, version),
        prune=pruned,
        fetch=_report(directory, "fetch", WholeModel, version),
    )


def _proof(directory: Path, version: str, pruned: Pruned) -> tuple[str, tuple[Claim, ...]]:
    """The hash of the weights that were proved, and the claims."""
    if (directory / "prove.json").is_file() or not (directory / "parity.json").is_file():
        proved = _report(directory, "prove", ProveReport, version)
        return proved.sha256, tuple(proved.claims)
    # Of version 0.1, which pruned only, and knew one claim.
    found = _report(directory, "parity", ParityReport, version)
    figures = {
        "max_logit_difference": found.max_logit_difference,
        "max_logit_difference_cached": found.max_logit_difference_cached,
    }
    claim = Claim(
        name="prune",
        statement="computes what the whole model does with the same sublayers masked",
        holds=found.passed,
        figures=figures,
        limit=found.tolerance,
    )
    return pruned.sha256, (claim,)


def _report(directory: Path, stage: str, kind: type[_Kind], version: str) -> _Kind:
    path = directory / f"{stage}.json"
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"version {version} carries no evidence/{path.name}: register it again") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"evidence/{path.name} of version {version} has no valid {where}: {problem['msg']}") from error


def source_of_whole(directory: Path, version: str) -> Fetch:
    """Where the version's whole model came from, as its params.yaml says.

    Raises:
        ValueError: it carries none, or one without a valid `fetch`.
    """
    try:
        return Fetch.model_validate(yaml_files.read(directory / "params.yaml")["fetch"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"evidence/params.yaml of version {version} names no source of a whole model") from error
