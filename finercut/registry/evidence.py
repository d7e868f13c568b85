"""The measurements stored with a registered version, in the `evidence/` that it carries.

A version may be older or newer than this finercut: only the fields that promotion and the repeated checks use are
required.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from finercut.checkpoint.records import Claim, ParityReport, Proved, Pruned
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
    params = _params(directory)
    return Evidence(
        version=version,
        sha256=sha256,
        claims=claims,
        evaluate=_completed(_report(directory, "evaluate", Evaluation, version), params, "evaluate"),
        throughput=_completed(_report(directory, "throughput", Speed, version), params, "throughput"),
        calibrate=_report(directory, "calibrate", HeldOut, version),
        prune=pruned,
        fetch=_report(directory, "fetch", WholeModel, version),
    )


def _proof(directory: Path, version: str, pruned: Pruned) -> tuple[str, tuple[Claim, ...]]:
    """The hash of the weights that were proved, and the claims."""
    if (directory / "prove.json").is_file() or not (directory / "parity.json").is_file():
        proved = _report(directory, "prove", Proved, version)
        return proved.sha256, tuple(proved.claims)
    # Version 0.1 had one step, pruning, and checked its claim under the name of parity.
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
    except OSError as error:
        raise ValueError(f"version {version} carries no evidence/{path.name}: register it again") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"evidence/{path.name} of version {version} has no valid {where}: {problem['msg']}") from error


# Settings that a report need not repeat: the version's params.yaml has them, also that of version 0.1.
_SETTINGS = {"evaluate": ("seed",), "throughput": ("kv_cache_gib", "max_model_len")}


def _completed(report: _Kind, params: Mapping[str, Any], section: str) -> _Kind:
    """`report` with the settings that it did not record."""
    settings = params.get(section)
    if not isinstance(settings, Mapping):
        return report
    return report.model_copy(
        update={
            name: settings[name]
            for name in _SETTINGS[section]
            if getattr(report, name) is None and isinstance(settings.get(name), int | float)
        }
    )


def _params(directory: Path) -> Mapping[str, Any]:
    """The version's params.yaml; empty where there is none that can be read."""
    try:
        params = yaml_files.read(directory / "params.yaml")
    except (OSError, ValueError):
        return {}
    return params if isinstance(params, Mapping) else {}


def source_of_whole(directory: Path, version: str) -> Fetch:
    """The source of the version's whole model, from its params.yaml.

    Fields that another version added are ignored, as in reports: what is fetched must have the recorded hash.

    Raises:
        ValueError: there is no params.yaml, or it has no valid `fetch`.
    """
    try:
        return Fetch.model_validate(_params(directory)["fetch"], extra="ignore")
    except (ValueError, KeyError) as error:
        raise ValueError(f"evidence/params.yaml of version {version} names no source of a whole model") from error
