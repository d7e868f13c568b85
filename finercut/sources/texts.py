"""Reads the documents of a text source: an installed package, a dataset of the hub, or files."""

from __future__ import annotations

import html
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finercut.sources import revisions
from finercut.sources.settings import FilesText, HubText, PackageText

if TYPE_CHECKING:
    pass

# Rows of a table are joined as the authors join wikitext's; paragraphs and whole texts stay apart.
_BETWEEN_ROWS, _BETWEEN_TEXTS = " ", "\n\n"
# Shorter strings in a package's data are labels, lists and figures rather than prose.
_PROSE_CHARACTERS = 200


@dataclass(frozen=True)
class Texts:
    """The documents of a source, in its order."""

    documents: list[str]
    separator: str
    """Joins neighbouring documents."""
    source: str
    """For people."""
    revision: str
    """Commit, version, or sha256 of the files."""


def read_texts(source: PackageText | HubText | FilesText) -> Texts:
    """
    Raises:
        FileNotFoundError: no such file.
        ValueError: a package, dataset, file or column that cannot be used, and why.
        RuntimeError: the hub gives no access or no answer.
    """
    if isinstance(source, PackageText):
        return _package_texts(source.name, source.version)
    if isinstance(source, HubText):
        return _hub_texts(source)
    return _file_texts(source.paths, source.column)


def _package_texts(name: str, version: str) -> Texts:
    """One document for each JSON file with prose in it."""
    pinned = f"{name}=={version}"
    install = f"run `python -m pip install {pinned}`"
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"{name} is not installed: {install}") from error
    if package.version != version:
        raise ValueError(f"{name} {package.version} is installed, not {version}: {install}")
    files = sorted((f for f in package.files or [] if f.suffix == ".json" and ".dist-info" not in f.parts[0]), key=str)
    contents = (json.loads(f.locate().read_text(encoding="utf-8")) for f in files)
    documents = [text for content in contents if (text := _BETWEEN_TEXTS.join(_prose(content)))]
    if not documents:
        raise ValueError(f"{pinned} has no prose in its {len(files)} JSON files: take another package, or files")
    return Texts(documents, _BETWEEN_TEXTS, pinned, version)


def _prose(content: Any) -> Iterator[str]:
    """The long strings of a JSON value that are made of sentences, without their HTML."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _prose(value)
    elif isinstance(content, str):
        broken = re.sub(r"<(?:br|/?p)\b[^>]*>", "\n", content)
        lines = html.unescape(re.sub(r"<[^>]+>", "", broken)).split("\n")
        text = "\n".join(line for line in (" ".join(line.split()) for line in lines) if line)
        if len(text) >= _PROSE_CHARACTERS and text[0].isupper() and text[-1] in '.!?)”"' and ". " in text:
            yield text


def _hub_texts(source: HubText) -> Texts:
    import datasets

    from finercut.sources import hub

    commit, _ = hub.resolve(source.dataset, source.revision, "dataset")
    with hub.hub_errors(source.dataset, source.revision, "dataset"):
        rows = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=commit)
    name = "/".join(part for part in (source.dataset, source.config, source.split) if part)
    _check_column(rows.column_names, source.column, name)
    return Texts(_all_text(rows[source.column], source.column, name), _BETWEEN_ROWS, name, commit)


def _file_texts(files: Sequence[Path], column: str) -> Texts:
    readers: dict[str, Callable[[Path, str], list[str]]] = {
        ".txt": lambda file, _: _paragraphs(file),
        ".jsonl": _json_rows,
        ".parquet": _parquet_rows,
    }
    for file in files:
        if file.suffix not in readers:
            raise ValueError(f"{file} is none of {', '.join(readers)}")
        if not file.is_file():
            raise FileNotFoundError(f"calibrate.source.paths: no file {file}")
    documents: list[str] = []
    for file in files:
        found = readers[file.suffix](file, column)
        if not any(text.strip() for text in found):
            raise ValueError(f"{file} is empty: take it out of calibrate.source.paths")
        documents += found
    separator = _BETWEEN_TEXTS if all(file.suffix == ".txt" for file in files) else _BETWEEN_ROWS
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return Texts(documents, separator, name, revisions.of_files(files))


def _read_utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}): convert it, with iconv for example") from error


def _paragraphs(file: Path) -> list[str]:
    return [text.strip() for text in re.split(r"\n\s*\n", _read_utf8(file)) if text.strip()]


def _json_rows(file: Path, column: str) -> list[str]:
    texts = []
    for number, line in enumerate(_read_utf8(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{file} line {number} is not JSON: {error}") from error
        _check_column(row if isinstance(row, dict) else [], column, f"{file} line {number}")
        texts.append(row[column])
    return _all_text(texts, column, str(file))


def _parquet_rows(file: Path, column: str) -> list[str]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as table:
            _check_column(table.schema_arrow.names, column, str(file))
            rows = table.read(columns=[column])[column].to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a parquet file: {error}") from error
    return _all_text(rows, column, str(file))


def _check_column(names: Any, column: str, where: str) -> None:
    if column not in names:
        found = ", ".join(map(str, names)) or "none"
        raise ValueError(f"{where} has no column {column!r}, only {found}: set calibrate.source.column")


def _all_text(values: Sequence[Any], column: str, where: str) -> list[str]:
    texts = list(values)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise ValueError(f"column {column!r} of {where} must hold text, row {number} holds {type(text).__name__}")
        if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"column {column!r} of {where} must hold text, row {number} holds half a character")
    return texts
