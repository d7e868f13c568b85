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
    explained: list[list[type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        key = field.alias or name
        value = (values or {}).get(key)
        sections = list(_sections(field.annotation))
        if sections:
            yield f"{indent}{key}:{_meaning(field)}"
            for alternative in sections:
                chosen = _chosen(alternative, value, _chosen_by(field))
                # What is explained above is not explained again.
                if chosen is not None or sections not in explained:
                    yield from _alternative(alternative, chosen, indent + "  ")
            explained.append(sections)
        else:
            given = values is not None and key in values
            yield f"{indent}{key}: {json.dumps(value, ensure_ascii=False) if given else ''}".rstrip() + _meaning(field)


def _alternative(section: type[BaseModel], values: dict | None, indent: str) -> Iterator[str]:
    """One shape a section can have."""
    if section.__doc__ and "__doc__" in vars(section):
        yield f"{indent}# {' '.join(inspect.getdoc(section).split())}"
    yield from _fields(section, values, indent)


def _chosen(section: type[BaseModel], value: object, chosen_by: str | None) -> dict | None:
    """The values of a section if it has this shape; of several in a list, those of the first that has."""
    allowed = typing.get_args(section.model_fields[chosen_by].annotation) if chosen_by else None
    for given in value if isinstance(value, list) else [value]:
        if isinstance(given, dict) and (allowed is None or given.get(chosen_by) in allowed):
            return given
    return None


def _chosen_by(field: FieldInfo) -> str | None:
    """Which field of an alternative says that it is the one, also where the alternatives are optional or in a list."""
    waiting: list[object] = [field.annotation]
    while waiting:
        annotation = waiting.pop()
        for inner in getattr(annotation, "__metadata__", ()):
            if isinstance(inner, FieldInfo) and isinstance(inner.discriminator, str):
                return inner.discriminator
        waiting += typing.get_args(annotation)
    return field.discriminator if isinstance(field.discriminator, str) else None


def _sections(annotation: object) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections(part)


def _meaning(field: FieldInfo) -> str:
    choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
    said = [part for part in (field.description, " or ".join(choices)) if part]
    return f"  # {' '.join(said)}" if said else ""
