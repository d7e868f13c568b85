"""The ordered removals of a selection with their divergences: one JSON line each, after a line of provenance.

Greedy search writes `Removal` lines: it continues from them. Every other method writes `Step` lines.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from finercut.selection.records import Controls, Refitted
from finercut.selection.selection import Chosen, Origin, Selection, left_over
from finercut.selection.settings import NOT_NESTED
from finercut.sublayers import Candidate, Sublayer, candidates, parse, protected
from finercut.system.records import Record
from finercut.system.staging import staged_file, writing


class Line(Record):
    """One line of the file. Unlike a report, it refuses fields it does not know: a search continues what it reads."""

    model_config = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        return self.model_dump_json() + "\n"


AnyLine = TypeVar("AnyLine", bound=Line)


class Provenance(Origin, Line):
    """Everything that decides which removals a method finds. A trajectory continues only under the same one."""

    method: str = "greedy"
    per: str | None = None
    """Of greedy: the cost whose saving is weighed against the divergence."""
    swaps: int = 0
    """Rounds of them."""
    budget: str | None = None
    """Where it decides what is removed, and not only how much."""
    costs_sha256: str | None = None
    """Of costs that are not the config's, where `per` or `budget` may be counted in them."""
    seed: int | None = None
    """Of random and evolutionary."""
    evolution: str | None = None
    """Where it starts, generations, offspring and removals exchanged, of evolutionary."""
    task_sha256: str | None = None
    """Of the examples of divergence task."""
    refit: str | None = None
    """Of greedy: how the model is refitted between removals, and the hash of the windows it is fitted to."""
    continuations: str | None = None
    """What is written for the controls: how many texts, of how many tokens."""
    candidates: Literal["attention", "mlp", "both", "blocks", "any"]
    protect: list[str]
    exclude: float | None
    dtype: str
    device: str
    """Its kind: cpu, cuda."""
    torch_version: str
    transformers_version: str
    mode: str
    error_probability: float | None
    """Of racing."""
    first_windows: int = 1
    """Calibration windows of the first part of every step."""
    window_weights: list[float] | None = None
    """Of the calibration windows, so that each source counts alike; null where all windows do."""
    code_sha256: str
    """Of the modules that search."""

    @property
    def key(self) -> str:
        """Names the folder of a search in progress."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def nested(self) -> bool:
        """Whether the first k removals are a selection of this method too, for every k."""
        return self.method not in NOT_NESTED and not self.swaps

    @property
    def name(self) -> str:
        """The method, with what else decides: greedy, greedy_per_parameters_swaps."""
        more = [(self.per, f"_per_{self.per}"), (self.swaps, "_swaps"), (self.refit, "_refitted")]
        return self.method + "".join(name for given, name in more if given)

    @property
    def line(self) -> type[Step]:
        """What follows this line."""
        return Removal if self.method == "greedy" and not self.swaps else Step


class Step(Line):
    """One removal, in the order of the method."""

    step: int
    """From 1."""
    sublayer: str
    """What was removed: 12.attention, 12.mlp, or 12.block."""
    divergence: Annotated[float, Field(allow_inf_nan=False)]
    """Of the model after this removal, on the calibration tokens: a mean over their sources."""
    held_out_divergence: float
    """The same on the held-out tokens."""
    held_out_by_source: dict[str, float] = Field({})
    """And on those of each source; empty where there is one."""
    controls: Controls | None = None
    """None where an earlier version measured none."""


class Removal(Step):
    """One step of greedy search."""

    refitted: Refitted | None = None
    """With `search.refit`: of the model that the next candidates are judged in. `divergence` and the other figures are
    those of the pruned model with the whole model's weights. None where no refit is asked for, or it is not better."""
    mode: str
    """exact, lazy or racing: what candidates are given up for before they are evaluated to the end."""
    values: dict[str, float]
    """Divergence of every candidate evaluated to the end, in the model that the step before left."""
    abandoned: dict[str, float]
    """Candidates given up once they could not be the least, with what they had come to by then."""
    stale: dict[str, float]
    """Lazy and racing: candidates given up for what they had come to in earlier steps, with that bound."""
    dropped: dict[str, float]
    """Racing: candidates given up by the test, with the estimate of their divergence."""
    margin: float | None
    """How far above `divergence` the least of `stale` and `dropped` is; null where the removal is exact."""
    largest_fall: float
    """The most by which a candidate's value of an earlier step was above that of this step: what is in `stale` may be
    that much too high."""
    error_probability: float
    """Racing: of the test having dropped the least candidate in this step; 0 where it dropped none."""
    by_window: dict[str, list[float]]
    """What each candidate evaluated in this step has come to on each calibration window, now or earlier, summed over
    tokens, by the window's weight; 0 where it was never evaluated. The next step starts from it."""
    evaluations: int
    """Candidates evaluated, to the end or not."""
    head_tokens: int
    """Tokens whose logits were computed, over all candidates."""
    sublayer_passes: int
    """(sublayer, calibration window) forwards of this step."""
    brute_force_sublayer_passes: int
    """What full forwards of every candidate would have taken."""


@dataclass(frozen=True)
class Trajectory:
    provenance: Provenance
    removals: tuple[Step, ...]
    """`Removal`s of greedy search."""

    def sublayers(self, n_removals: int | None = None) -> list[Sublayer]:
        """What the first `n_removals` removals (all, by default) took out, in their order."""
        return [s for removal in self.removals[:n_removals] for s in parse(removal.sublayer).sublayers]

    def to_text(self) -> str:
        return "".join(line.to_json() for line in (self.provenance, *self.removals))

    @property
    def left(self) -> list[Candidate]:
        """Candidates that the next removal could take."""
        origin = self.provenance
        return left_over(origin.n_blocks, origin.candidates, origin.protect, (r.sublayer for r in self.removals))

    def selection(self) -> Selection:
        return Selection(
            method=self.provenance.name,
            nested=self.provenance.nested,
            removals=[
                Chosen(candidate=r.sublayer, divergence=r.divergence, held_out_divergence=r.held_out_divergence)
                for r in self.removals
            ],
            left=[str(candidate) for candidate in self.left] if self.provenance.nested else [],
            origin=Origin.model_validate(self.provenance.model_dump(include=set(Origin.model_fields))),
        )


def read_trajectory(path: Path) -> Trajectory:
    """
    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is not what it should be; says which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no trajectory at {path}: run `finercut search` first")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a trajectory: {error}") from error
    return parse_trajectory(text, str(path))


def parse_trajectory(text: str, path: str) -> Trajectory:
    """A trajectory from its text. `path` names it in errors.

    Raises:
        ValueError: a line is not what it should be; says which.
    """
    lines = text.splitlines()
    if not lines:
        raise ValueError(f"{path} is empty; a trajectory starts with a line of provenance")
    try:
        provenance = Provenance.model_validate_json(lines[0])
        protected(provenance.protect, provenance.n_blocks)
    except ValueError as error:
        raise ValueError(f"{path}:1: not a trajectory's provenance: {_first(error)}") from error
    pool = {str(c) for c in candidates(provenance.n_blocks, provenance.candidates)}
    removals: list[Step] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            removal = provenance.line.model_validate_json(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a removal: {_first(error)}") from error
        if removal.sublayer not in pool or removal.step != len(removals) + 1 or _overlaps(removal, removals):
            raise ValueError(
                f"{path}:{number}: step {removal.step} ({removal.sublayer}) does not follow the ones before"
            )
        removals.append(removal)
    return Trajectory(provenance, tuple(removals))


def resume(path: Path, provenance: Provenance) -> Trajectory:
    """What an earlier, perhaps killed, search left at `path`; starts the file if there is none.

    A line that a kill tore is dropped from the file.

    Raises:
        ValueError: the trajectory at `path` has other provenance; names the first difference.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    whole, newline, torn = text.rpartition("\n")
    if not newline:
        write(path, Trajectory(provenance, ()))
    elif torn:
        _replace(path, whole + newline)
    found = read_trajectory(path)
    for name, ours in provenance:
        theirs = getattr(found.provenance, name)
        if theirs != ours:
            raise ValueError(f"{path} belongs to another search: its {name} is {theirs!r}, this one's {ours!r}")
    return found


def _overlaps(step: Step, earlier: Iterable[Step]) -> bool:
    gone = {s for each in earlier for s in parse(each.sublayer).sublayers}
    return not gone.isdisjoint(parse(step.sublayer).sublayers)


def read_lines(path: Path, kind: type[AnyLine]) -> list[AnyLine]:
    """What an earlier, perhaps killed, search left at `path`. A line that a kill tore is dropped from the file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    found: list[AnyLine] = []
    for line in text:
        try:
            found.append(kind.model_validate_json(line))
        except ValidationError:
            break
        if not line.endswith("\n"):
            found.pop()
            break
    if len(found) < len(text):
        _replace(path, "".join(line.to_json() for line in found))
    return found


def append(path: Path, line: Line) -> None:
    """Add one line; when this returns, it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(line.to_json())
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, trajectory: Trajectory) -> None:
    """Replace `path` atomically."""
    _replace(path, trajectory.to_text())


def _replace(path: Path, text: str) -> None:
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _first(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
