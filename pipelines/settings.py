"""Which settings an execution takes. DVC reads params.yaml, so whatever is chosen has to become it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import GetJsonSchemaHandler, JsonValue
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from finercut.system.staging import staged_file
from pipelines import params

PARAMS = Path("params.yaml")
PREVIOUS = Path(".finercut/params.previous.yaml")


def offered() -> list[str]:
    """The params files of the project in the current directory."""
    return [str(PARAMS), *sorted(str(path) for path in Path("params").glob("*.yaml"))]


class _Offered:
    """Puts the choice into the JSON schema that a deployment is given, and so into the form of Prefect's UI."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(core_schema) | {"enum": offered()}


ParamsFile = Annotated[str, _Offered()]


def take_committed(file: str, overrides: Mapping[str, JsonValue]) -> None:
    """Make params.yaml what git has of `file`, with single fields changed.

    From the commit and not from the working tree, so that what one execution overrode, the next one does not inherit.

    Args:
        file: one of `offered()`
        overrides: by dotted name, `{"prune.budget.amount": 0.3}`

    Raises:
        ValueError: git has no such file, there is no such field, or its value is not allowed.
    """
    shown = subprocess.run(["git", "show", f"HEAD:./{file}"], capture_output=True, text=True, check=False)
    if file not in offered() or shown.returncode:
        raise ValueError(f"no params file {file} in the last commit; there are {', '.join(offered())}")
    text = shown.stdout
    if overrides:
        text = yaml.safe_dump(_overridden(yaml.safe_load(text), overrides), sort_keys=False)
    params.parse(text, " and ".join([file, *(["overrides"] if overrides else [])]))
    replace(text)


def _overridden(document: dict, overrides: Mapping[str, JsonValue]) -> dict:
    for name, value in overrides.items():
        *sections, field = name.split(".")
        section = document
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise ValueError(f"overrides: no field {name}; names look like prune.budget.amount")
        section[field] = value
    return document


def replace(text: str) -> bool:
    """Make `text` params.yaml, keeping what it was in `PREVIOUS`; whether that changed it."""
    if PARAMS.is_file() and PARAMS.read_text(encoding="utf-8") == text:
        return False
    if PARAMS.is_file():
        PREVIOUS.parent.mkdir(exist_ok=True)
        shutil.copyfile(PARAMS, PREVIOUS)
    with staged_file(PARAMS) as partial:
        partial.write_text(text, encoding="utf-8")
    return True
