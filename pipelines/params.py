"""The typed form of params.yaml, composed of the sections that the sub-packages of `finercut` define."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from pathlib import Path, PurePath
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, ValidationError, model_validator

from finercut.checkpoint.settings import Heal, Prove, Prune, Quantise
from finercut.evaluation.settings import Evaluate
from finercut.registry.settings import Collect, Promote, Register
from finercut.selection.settings import MEASURED, TARGETS, Budget, Search
from finercut.serving.settings import Throughput
from finercut.sources.settings import Calibrate, Fetch, HubModel, LocalModel
from finercut.system import redaction, yaml_files
from finercut.system.settings import Section
from finercut.system.yaml_files import Entry

from . import paths

Stage = Literal[
    "fetch",
    "calibrate",
    "prove_whole",
    "evaluate_whole",
    "costs",
    "search",
    "prune",
    "heal",
    "quantise",
    "prove",
    "evaluate",
    "throughput",
    "report",
]
# Errors beyond these are only counted.
N_ERRORS_SHOWN = 5
# Booleans in YAML 1.1, text in YAML 1.2.
_YES_OR_NO = frozenset({"yes", "no", "on", "off", "y", "n"})


class Flow(Section):
    experiment: str
    """MLflow experiment."""
    retries: dict[Stage, Annotated[int, Field(ge=0)]]
    """Additional attempts of each stage; 0 for stages not named."""
    retry_delay_s: Annotated[float, Field(ge=0)]
    timeout_s: dict[Stage, PositiveFloat]
    """Limit for each attempt of a stage; none for stages not named."""


class Params(Section):
    fetch: Fetch
    calibrate: Calibrate
    search: Search
    prune: Prune
    heal: Heal
    quantise: Quantise
    prove: Prove
    evaluate: Evaluate
    throughput: Throughput
    register_: Annotated[Register, Field(alias="register")]
    promote: Promote
    collect: Collect
    flow: Flow

    @property
    def model(self) -> str:
        """The whole model's name, for people."""
        source = self.fetch.source
        if isinstance(source, HubModel):
            return source.repository.rpartition("/")[2]
        return source.path.resolve().name if isinstance(source, LocalModel) else PurePath(source.file).stem

    @property
    def title(self) -> str:
        """Model and budget: what an execution is called."""
        return f"{self.model} {shown(self.prune.budget)}"

    @model_validator(mode="after")
    def _per_is_measured(self) -> Params:
        per, budget = self.search.per, self.prune.budget
        if per in TARGETS.values() and per != budget.cost and budget.cost not in MEASURED:
            units = [unit for unit, cost in TARGETS.items() if cost == per or cost in MEASURED]
            raise ValueError(
                f"search.per = {per} goes with a prune.budget in {' or '.join(units)}, not in {budget.unit}: give the "
                "budget in one of these, or set search.per to parameters, say"
            )
        return self

    @model_validator(mode="after")
    def _healing_holds_windows(self) -> Params:
        heal, calibrate = self.heal, self.calibrate
        if heal.method in ("reconstruct", "distill"):
            heal.check(calibrate.n_tokens)
        if self.search.refit is not None and calibrate.n_healing_samples < 2:
            raise ValueError(
                "search.refit fits to some healing windows and judges by others: set calibrate.n_healing_samples to 2 "
                f"at least, not {calibrate.n_healing_samples}"
            )
        n_windows = calibrate.n_healing_samples or calibrate.n_samples
        if heal.method in ("refit", "reconstruct") and n_windows < 2:
            raise ValueError(
                f"heal.method {heal.method} fits to some windows and judges by others: set calibrate.n_healing_samples "
                f"to 2 at least, not {calibrate.n_healing_samples}"
            )
        return self


def shown(budget: Budget) -> str:
    """`less 20 % of parameters`, `at 1.3 times the speed`."""
    if budget.is_target:
        return {
            "memory_gib": f"within {budget.amount:g} GiB",
            "speed_up": f"at {budget.amount:g} times the speed",
            "tpot_ms": f"within {budget.amount:g} ms a token",
        }[budget.unit]
    unit = budget.unit.replace("kv_cache", "KV cache")
    return f"less {100 * budget.amount:g} % of {unit}" if budget.amount < 1 else f"less {budget.amount:g} {unit}"


def load(path: Path = paths.PARAMS) -> Params:
    """Read and check a params file.

    Raises:
        FileNotFoundError: there is none at `path`.
        ValueError: as `parse`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no params file at {path}; run from the project's root, or name one")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: {error}; save it as UTF-8") from error
    return parse(text, str(path))


def parse(text: str, name: str) -> Params:
    """Check the text of a params file.

    Args:
        name: what error messages call the file

    Raises:
        ValueError: it is not YAML, contains a credential, or a field is missing, unknown or out of range; one line.
    """
    given = yaml_files.parse(text, name)
    found = list(yaml_files.entries(text, name))
    _refuse_credentials(text, found, name)
    _refuse_former_names(given, name)
    try:
        return Params.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{name}: {_complaints(error, given, found)}") from error


# Where fields of version 0.1 are now.
_FORMER = {
    "retention": "the section is called collect",
    "evaluate.parity_tolerance": "it is prove.logit_tolerance",
    "throughput.parity_tolerance": "it is prove.log_probability_tolerance",
}


def _refuse_former_names(given: object, name: str) -> None:
    for former, now in _FORMER.items():
        *sections, field = former.split(".")
        section = given
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and field in section:
            raise ValueError(f"{name}: {former}: since version 0.2 {now}; CHANGELOG.md lists what moved")


def _refuse_credentials(text: str, found: Iterable[Entry], name: str) -> None:
    """Every run stores the file, comments included, where many can read it.

    What a value may be does not depend on the machine, except that it must not be a credential of the environment.
    """
    stored = "every run stores this file: remove it, and pass it through the environment instead"
    for number, line in enumerate(text.splitlines(), start=1):
        if redaction.contains_token(line):
            raise ValueError(f"{name}:{number}: this line contains a credential, and {stored}")
    for entry in found:
        if entry.text is None:
            continue
        field = ".".join(map(str, entry.place))
        if redaction.contains_password(entry.text):
            raise ValueError(f"{name}:{entry.line}: {field} contains a credential, in a URI, and {stored}")
        if variable := redaction.variable_holding(entry.text):
            raise ValueError(
                f"{name}:{entry.line}: {field} is the credential in the environment variable {variable}, and every run "
                "stores this file: remove it here; where the variable holds no credential, rename it"
            )


def _complaints(error: ValidationError, given: object, found: Iterable[Entry]) -> str:
    """One phrase a field; values are not shown, one may be a secret."""
    lines = {entry.place: entry.line for entry in found}
    messages: dict[str, list[str]] = {}
    shown: dict[str, str] = {}
    for e in error.errors(include_url=False, include_context=False):
        place = _place(e["loc"], given)
        field = ".".join(map(str, place)) or "the file"
        shown[field] = f" (line {lines[place]})" if place in lines else ""
        messages.setdefault(field, []).append(e["msg"].removeprefix("Value error, ") + _advice(e["type"], e["input"]))
    phrases = [f"{field}: {' or '.join(dict.fromkeys(said))}{shown[field]}" for field, said in messages.items()]
    more = [f"{len(phrases) - N_ERRORS_SHOWN} more"] if len(phrases) > N_ERRORS_SHOWN else []
    return "; ".join(phrases[:N_ERRORS_SHOWN] + more)


def _advice(problem: str, value: object) -> str:
    """What to write, where YAML reads a value as another type than its writer may have meant."""
    if problem == "string_type" and isinstance(value, int | float | date):
        return ": put it in quotes"
    if problem == "bool_type" and isinstance(value, str) and value.lower() in _YES_OR_NO:
        return ": write true or false"
    if problem == "int_type" and isinstance(value, float) and value.is_integer():
        return ": write it without point and exponent"
    if problem in ("int_type", "float_type") and isinstance(value, str) and _is_number(value):
        return ": write it without quotes"
    if problem in ("int_type", "float_type") and isinstance(value, str) and value.endswith("%"):
        return ": write a share as 0.25"
    if problem == "path_type" and value is None:
        return ": write ~/, as ~ alone is null"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _place(location: tuple[int | str, ...], given: object) -> tuple[int | str, ...]:
    """Where in the file: pydantic's location also names the alternatives it tried."""
    place: list[int | str] = []
    for part in location:
        inside = given if isinstance(given, dict) else dict(enumerate(given)) if isinstance(given, list) else {}
        if part in inside:
            given = inside[part]
        elif not (isinstance(given, dict) and part == location[-1]):
            continue
        place.append(part)
    return tuple(place)
