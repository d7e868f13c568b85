"""What a registered version was measured to be, from the `evidence/` it carries.

Read leniently, unlike the reports of this workspace: a version may be older or younger than this finercut, and only
what the rule of promotion and the repeated checks need has to be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from finercut.sources.settings import Fetch


class Recorded(BaseModel):
    """The part of a report that is needed; its other fields are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Parity(Recorded):
    passed: bool
    tolerance: float
    max_logit_difference: float
    max_logit_difference_cached: float


class TaskResult(Recorded):
    metric: str
    retention: float | None
    n_samples: int
    n_available: int
    n_fewshot: int


class Evaluation(Recorded):
    tasks: dict[str, TaskResult]
    mean_retention: float | None
    perplexity_ratio: float


class Throughput(Recorded):
    speed_up: float
    input_tokens: int
    output_tokens: int
    concurrency: int
    dtype: str
    enforce_eager: bool
    hardware: str


class Calibration(Recorded):
    held_out_sha256: str


class Pruning(Recorded):
    sha256: str
    """Of the pruned weights."""
    removed: list[str]


class Whole(Recorded):
    source: str
    revision: str
    sha256: str
    """Of the whole model's weights."""
    max_position_embeddings: int


@dataclass(frozen=True)
class Evidence:
    """The reports of one version."""

    version: str
    parity: Parity
    evaluate: Evaluation
    throughput: Throughput
    calibrate: Calibration
    prune: Pruning
    fetch: Whole


_Kind = TypeVar("_Kind", bound=Recorded)


def read(directory: Path, version: str) -> Evidence:
    """
    Args:
        directory: the version's downloaded `evidence/`

    Raises:
        ValueError: a report is missing, or says nothing of what is needed.
    """
    return Evidence(
        version=version,
        parity=_report(directory, "parity", Parity, version),
        evaluate=_report(directory, "evaluate", Evaluation, version),
        throughput=_report(directory, "throughput", Throughput, version),
        calibrate=_report(directory, "calibrate", Calibration, version),
        prune=_report(directory, "prune", Pruning, version),
        fetch=_report(directory, "fetch", Whole, version),
    )


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
        return Fetch.model_validate(yaml.safe_load((directory / "params.yaml").read_text(encoding="utf-8"))["fetch"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"evidence/params.yaml of version {version} names no source of a whole model") from error
