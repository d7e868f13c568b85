"""What a page is made from: the reports of one execution, from a workspace, an MLflow run or a registered version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from finercut.checkpoint.records import Claim, HealReport, ProveReport, PruneReport, QuantiseReport
from finercut.evaluation.records import EvaluateReport, Measured
from finercut.registry import evidence, gate
from finercut.registry.records import Check
from finercut.registry.settings import Register
from finercut.report.frontier import FrontierReport, containing
from finercut.selection.records import SearchReport
from finercut.serving.records import ThroughputReport
from finercut.sources.records import CalibrateReport, FetchReport
from finercut.system import yaml_files
from finercut.system.records import Record

_Kind = TypeVar("_Kind", bound=Record)

# Sections of params.yaml that decide the result; the others say where and how it is made.
SECTIONS = ("fetch", "calibrate", "search", "prune", "heal", "quantise", "prove", "evaluate", "throughput", "register")


class Step(Record):
    """One line of a trajectory, by whichever method and version; without what a page does not show."""

    step: int
    sublayer: str
    divergence: float
    held_out_divergence: float
    values: dict[str, float] = Field(default_factory=dict)
    """Divergence of every candidate evaluated to the end; empty where the method evaluates none."""

    @property
    def next_best(self) -> tuple[str, float] | None:
        """The candidate that would have been removed in its place, of those evaluated to the end."""
        others = [(value, name) for name, value in self.values.items() if name != self.sublayer]
        return min(others)[::-1] if others else None


@dataclass(frozen=True)
class Inputs:
    """None is what an older version did not record."""

    fetch: FetchReport
    calibrate: CalibrateReport
    search: SearchReport | None
    prune: PruneReport
    heal: HealReport | None
    quantise: QuantiseReport | None
    prove: ProveReport | None
    evaluate_whole: Measured | None
    evaluate: EvaluateReport
    throughput: ThroughputReport
    claims: Sequence[Claim]
    steps: Sequence[Step]
    """Those that the budget took, in order; empty where no trajectory was kept."""
    settings: Mapping[str, Any]
    """SECTIONS of params.yaml."""
    frontier: FrontierReport | None
    """The last one, if this execution's final checkpoint is a point of it."""

    @property
    def healed(self) -> bool:
        """Whether the final checkpoint's weights differ from the pruned one's."""
        return (self.heal is not None and self.heal.method != "none") or self.quantised

    @property
    def quantised(self) -> bool:
        return self.quantise is not None and self.quantise.method != "none"

    @property
    def final_bytes(self) -> int:
        """Of the final checkpoint's safetensors files; healing keeps the pruned one's size."""
        return self.quantise.bytes_after if self.quantised else self.prune.pruned_bytes

    @property
    def last_step(self) -> str:
        """What the final checkpoint is called where it is not the pruned one."""
        return "quantised" if self.quantised else "healed"

    @property
    def final_sha256(self) -> str:
        """Of the final checkpoint's weights."""
        return _final(self.prune, self.heal, self.quantise).sha256

    @property
    def checks(self) -> list[Check]:
        """The gate of registration, with the limits of the execution's own params.yaml."""
        try:
            settings = Register.model_validate(self.settings["register"], extra="ignore")
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise ValueError(f"its params.yaml has no valid register.{where}: {problem['msg']}") from error
        return gate.check(self.claims, self.evaluate, self.throughput, **settings.limits)


def read(folders: Sequence[Path], whose: str) -> Inputs:
    """
    Args:
        folders: where to look for each file: the reports, the trajectory, params.yaml
        whose: what error messages call the execution

    Raises:
        ValueError: a report is missing, because the execution did not get so far, or is of another form.
    """
    fetch = _required(folders, "fetch", FetchReport, whose)
    calibrate = _required(folders, "calibrate", CalibrateReport, whose)
    prune = _required(folders, "prune", PruneReport, whose)
    prove = _optional(folders, "prove", ProveReport)
    evaluate = _required(folders, "evaluate", EvaluateReport, whose)
    throughput = _required(folders, "throughput", ThroughputReport, whose)
    heal = _optional(folders, "heal", HealReport)
    quantise = _optional(folders, "quantise", QuantiseReport)
    return Inputs(
        fetch=fetch,
        calibrate=calibrate,
        search=_optional(folders, "search", SearchReport),
        prune=prune,
        heal=heal,
        quantise=quantise,
        prove=prove,
        evaluate_whole=_optional(folders, "evaluate_whole", Measured),
        evaluate=evaluate,
        throughput=throughput,
        claims=prove.claims if prove else evidence.read(_found(folders, "evaluate.json").parent, whose).claims,
        steps=_steps(folders)[: prune.n_removals],
        settings=_settings(folders, whose),
        frontier=containing(_found(folders, "frontier.json"), _final(prune, heal, quantise).sha256),
    )


def _final(
    prune: PruneReport, heal: HealReport | None, quantise: QuantiseReport | None
) -> PruneReport | HealReport | QuantiseReport:
    """The report of the last step that ran."""
    return quantise or heal or prune


def _found(folders: Sequence[Path], name: str) -> Path | None:
    return next((path for folder in folders if (path := folder / name).is_file()), None)


def _required(folders: Sequence[Path], stage: str, kind: type[_Kind], whose: str) -> _Kind:
    path = _found(folders, f"{stage}.json")
    if path is None:
        raise ValueError(f"{whose} has no {stage}.json: a report needs an execution whose stages have all ended")
    return kind.read(path)


def _optional(folders: Sequence[Path], stage: str, kind: type[_Kind]) -> _Kind | None:
    """None where there is none, or another version recorded other things."""
    path = _found(folders, f"{stage}.json")
    try:
        return None if path is None else kind.read(path)
    except ValueError:
        return None


def _steps(folders: Sequence[Path]) -> list[Step]:
    """From the trajectory; none where it was not kept."""
    if path := _found(folders, "trajectory.jsonl"):
        try:
            return [Step.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        except ValidationError as error:
            raise ValueError(f"{path} is not a trajectory: {error.errors()[0]['msg']}") from error
    return []


def _settings(folders: Sequence[Path], whose: str) -> Mapping[str, Any]:
    path = _found(folders, "params.yaml")
    settings = None if path is None else yaml_files.read(path)
    if not isinstance(settings, Mapping) or not isinstance(settings.get("register"), Mapping):
        raise ValueError(f"{whose} has no params.yaml with a section `register`")
    # Plain values: the file's own keep its comments.
    return json.loads(json.dumps({name: settings[name] for name in SECTIONS if name in settings}, default=str))
