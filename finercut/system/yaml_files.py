"""Reads and writes YAML 1.2 with ruamel.yaml, as DVC does, so that one file means the same to both.

In YAML 1.2 `1e-4` is a number, `yes` and `on` are text, and a key that is twice in a mapping is an error. Only
prefect.yaml is read as YAML 1.1, because Prefect does so.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode, RoundTripRepresenter, ScalarNode, SequenceNode
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError


def read(path: Path, version: str = "1.2") -> Any:
    """As `parse`, from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or as `parse`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: {error}; save it as UTF-8") from error
    return parse(text, str(path), version)


def parse(text: str, name: str, version: str = "1.2") -> Any:
    """The document as plain dicts, lists and scalars.

    Args:
        text: one document
        name: what error messages call it
        version: "1.1" for files whose other readers follow YAML 1.1

    Raises:
        ValueError: it is not YAML, or a mapping has a key twice; one line with the line number.
    """
    return _explained(_yaml("safe", version).load, text, name)


def editable(text: str, name: str) -> Any:
    """As `parse`, but with comments and layout: `dump` writes what was not changed as it was."""
    return _explained(_yaml("rt").load, text, name)


def dump(document: Any, version: str = "1.2") -> str:
    """The YAML text of a document from `editable`, or of plain dicts, lists and scalars."""
    text = io.StringIO()
    _yaml("rt", version).dump(document, text)
    return text.getvalue()


@dataclass(frozen=True)
class Entry:
    """A value of a mapping or an item of a list."""

    place: tuple[str | int, ...]
    """Keys and list indices from the top."""
    line: int
    """From 1."""
    text: str | None
    """A scalar as it is written, without quotes; None for mappings and lists."""


def entries(text: str, name: str) -> Iterator[Entry]:
    """Every entry of a document, each anchored one once.

    Raises:
        ValueError: as `parse`.
    """
    waiting = deque([((), _explained(_yaml("safe").compose, text, name))])
    seen = set()  # an alias is the node of its anchor, which can contain it
    while waiting:
        place, node = waiting.popleft()
        if id(node) in seen:
            continue
        seen.add(id(node))
        inside = []
        if isinstance(node, MappingNode):
            inside = [(key.value if isinstance(key, ScalarNode) else "?", key, value) for key, value in node.value]
        elif isinstance(node, SequenceNode):
            inside = [(index, item, item) for index, item in enumerate(node.value)]
        for part, start, value in inside:
            yield Entry(
                place=(*place, part),
                line=start.start_mark.line + 1,
                text=str(value.value) if isinstance(value, ScalarNode) else None,
            )
            waiting.append(((*place, part), value))


class _Representer(RoundTripRepresenter):
    """Writes `null`, where ruamel.yaml would leave the value empty."""

    def represent_none(self, _: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def _yaml(kind: str, version: str = "1.2") -> YAML:
    # Without the parser in C, which is optional, and ends the process on deeply nested brackets.
    yaml = YAML(typ=kind, pure=True)
    if version != "1.2":
        yaml.version = tuple(map(int, version.split(".")))
    if kind == "rt":
        yaml.Representer = _Representer
        yaml.preserve_quotes = True
        yaml.width = 10_000  # no line is broken that was one
        yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _explained(action: Callable[[str], Any], text: str, name: str) -> Any:
    try:
        return action(text)
    except DuplicateKeyError as error:
        # Its own text shows the values, which may be secret.
        key = error.problem.partition('"')[2].partition('"')[0]
        raise ValueError(
            f"{name}:{error.problem_mark.line + 1}: {key} is there twice in one section; remove one of the two"
        ) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ValueError(f"{where} is not YAML: {_line(error.problem or error.context)}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is not YAML: it is nested too deeply") from error
    # What ruamel.yaml makes of `!!bool maybe`, `!!int x` and the 30th of February, without saying where.
    except (YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{name} is not YAML: {_line(error)}") from error


def _line(problem: object) -> str:
    return " ".join(str(problem).split())[:300]
