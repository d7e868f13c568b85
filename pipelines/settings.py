"""Copies the chosen params file over params.yaml, the only one DVC reads."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import GetJsonSchemaHandler, JsonValue, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from finercut.selection.settings import Budget
from finercut.system import yaml_files
from finercut.system.staging import staged_file

from . import params
from .paths import PARAMS, PREVIOUS

# The first line of a params.yaml with overrides.
_ORIGIN = re.compile(r"# (?P<file>.+?) as committed, with overrides (?P<overrides>\{.*\})\n")


def offered() -> list[str]:
    """The params files of the project in the current directory."""
    return [str(PARAMS), *sorted(str(path) for path in Path("params").glob("*.yaml"))]


class _Offered:
    """Lists the files in the JSON schema of a deployment, and so in the form of Prefect's UI."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(core_schema) | {"enum": offered()}


ParamsFile = Annotated[str, _Offered()]


def take_committed(file: str, overrides: Mapping[str, JsonValue]) -> None:
    """Make params.yaml what the last commit has of `file`, with single fields changed.

    From the commit and not from the working tree, so that no execution inherits what another one overrode. With
    overrides, the first line of params.yaml is a comment that names `file` and them.

    Args:
        file: one of `offered()`
        overrides: by dotted name, `{"prune.budget.amount": 0.3}`

    Raises:
        ValueError: the commit has no such file, there is no such field, or its value is not allowed.
    """
    replace(_origin(file, overrides) + committed(file, overrides))


def committed(file: str, overrides: Mapping[str, JsonValue]) -> str:
    """What `take_committed` makes params.yaml, but for the first line; it raises what that does."""
    text = _committed(file) if file in offered() else None
    if text is None:
        raise ValueError(f"no params file {file} in the last commit; there are {', '.join(offered())}")
    text = _with_overrides(text, file, overrides)
    params.parse(text, " and ".join([file, *(["overrides"] if overrides else [])]))
    return text


def is_committed(file: str) -> bool:
    return _shown(file) is not None


def source() -> dict[str, str] | None:
    """Tags that name the committed file that params.yaml is, and the overrides of `take_committed`.

    Returns:
        None if params.yaml has been changed in any other way.
    """
    text = PARAMS.read_bytes() if PARAMS.is_file() else b""
    for file in offered():
        if _shown(file) == text:
            return {"params.file": file}
    origin = _ORIGIN.match(text.decode("utf-8", errors="replace"))
    if origin is None:
        return None
    file = origin["file"]
    try:
        overrides = json.loads(origin["overrides"])
        taken = _origin(file, overrides) + _with_overrides(_committed(file) or "", file, overrides)
    except ValueError:
        return None
    return {"params.file": file, "params.overrides": origin["overrides"]} if taken.encode() == text else None


def _origin(file: str, overrides: Mapping[str, JsonValue]) -> str:
    return f"# {file} as committed, with overrides {json.dumps(dict(overrides))}\n" if overrides else ""


def _committed(file: str) -> str | None:
    """The text of `file` in the last commit, if it is there."""
    shown = _shown(file)
    try:
        return None if shown is None else shown.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not YAML: {error}; save it as UTF-8") from error


def _shown(file: str) -> bytes | None:
    return git("show", f"HEAD:./{file}")


def git(*arguments: str) -> bytes | None:
    """What git prints; None where it fails.

    Raises:
        RuntimeError: git does not work here: it is not installed, or the clone is another user's.
    """
    english = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, env=english, check=False)
    except FileNotFoundError as error:
        raise RuntimeError("git is not installed, which says what a run was made from: install it") from error
    if b"dubious ownership" in done.stderr:
        raise RuntimeError(
            f"{Path.cwd()} belongs to another user, so that git does not work in it; if you trust it, run "
            f"`git config --global --add safe.directory {shlex.quote(str(Path.cwd()))}`, or clone it as this user"
        )
    return None if done.returncode else done.stdout


def _with_overrides(text: str, name: str, overrides: Mapping[str, JsonValue]) -> str:
    if not overrides:
        return text
    document = yaml_files.editable(text, name)
    for dotted, value in overrides.items():
        *sections, field = dotted.split(".")
        section = document
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise ValueError(f"overrides: no field {dotted}; names look like prune.budget.amount")
        section[field] = value
    return yaml_files.dump(document)


def check_budgets(amounts: Sequence[float], unit: str) -> None:
    """Whether params.yaml allows each of them as its `prune.budget`.

    Raises:
        ValueError: it does not, or one comes twice.
    """
    budgets = [{"unit": unit, "amount": amount} for amount in budget_amounts(amounts, unit)]
    for budget in budgets:
        try:
            Budget.model_validate(budget)
        except ValidationError as error:
            said = " or ".join(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in error.errors()))
            raise ValueError(f"budget {budget['amount']:g} {unit}: {said}") from error
    # What goes together with a unit goes with every amount.
    changes = {f"prune.budget.{name}": value for name, value in budgets[0].items()}
    params.parse(_with_overrides(PARAMS.read_text(encoding="utf-8"), str(PARAMS), changes), str(PARAMS))


def budget_amounts(amounts: Sequence[float], unit: str) -> list[float | int]:
    """A frontier's, with numbers of sublayers, which may come as 8.0, as integers.

    Raises:
        ValueError: one comes twice.
    """
    if len(set(amounts)) < len(amounts):
        raise ValueError(f"the frontier's budgets {', '.join(map(str, amounts))} name one twice")
    counted = unit == "sublayers"
    return [int(amount) if counted and amount >= 1 and amount == int(amount) else amount for amount in amounts]


def change(text: str, changes: Mapping[str, JsonValue]) -> None:
    """Make params.yaml `text` with single fields changed, as `take_committed` does with a committed file.

    Raises:
        ValueError: there is no such field, or its value is not allowed.
    """
    changed = _with_overrides(text, str(PARAMS), changes)
    params.parse(changed, str(PARAMS))
    replace(changed)


def replace(text: str) -> bool:
    """Make `text` params.yaml, keeping what it was in `PREVIOUS`; whether that changed it."""
    if PARAMS.is_file() and PARAMS.read_bytes() == text.encode():
        return False
    if PARAMS.is_file():
        PREVIOUS.parent.mkdir(exist_ok=True)
        shutil.copyfile(PARAMS, PREVIOUS)
    with staged_file(PARAMS) as partial:
        partial.write_bytes(text.encode())
    return True
