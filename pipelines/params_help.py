"""Explains every field of params.yaml, from the docstrings of its sections."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finercut.system import yaml_files

from .params import Params, load


def text(path: Path) -> str:
    """Every field with its meaning, what it may be, and its value in `path`; laid out as YAML.

    Raises:
        FileNotFoundError, ValueError: as `pipelines.params.load`.
    """
    load(path)
    return "\n".join(_fields(Params, yaml_files.read(path), ""))


def _fields(section: type[BaseModel], values: dict | None, indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = field.alias or name
        value = (values or {}).get(key)
        sections = list(_sections(field.annotation))
        if sections:
            yield f"{indent}{key}:"
            for alternative in sections:
                yield from _alternative(alternative, value, indent + "  ", chosen_by=field.discriminator)
        else:
            given = values is not None and key in values
            yield f"{indent}{key}: {json.dumps(value, ensure_ascii=False) if given else ''}".rstrip() + _meaning(field)


def _alternative(section: type[BaseModel], value: object, indent: str, chosen_by: str | None) -> Iterator[str]:
    """One shape a section can have; a list of sections shows its first."""
    values = value[0] if isinstance(value, list) and value else value
    allowed = typing.get_args(section.model_fields[chosen_by].annotation) if chosen_by else None
    used = isinstance(values, dict) and (allowed is None or values[chosen_by] in allowed)
    if section.__doc__ and "__doc__" in vars(section):
        yield f"{indent}# {' '.join(inspect.getdoc(section).split())}"
    yield from _fields(section, values if used else None, indent)


def _sections(annotation: object) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections(part)


def _meaning(field: FieldInfo) -> str:
    choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
    said = [part for part in (field.description, " or ".join(choices)) if part]
    return f"  # {' '.join(said)}" if said else ""
