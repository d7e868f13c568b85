"""Reads the documents of a text source: an installed package, a dataset of the hub, or files."""

from __future__ import annotations

import html
import importlib.metadata
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finercut.sources import revisions
from finercut.sources.settings import FilesText, HubText, PackageText

logger = logging.getLogger("finercut")

# Rows of a table are joined as the authors join wikitext's; paragraphs and whole texts stay apart, lines stay lines.
_BETWEEN_ROWS, _BETWEEN_TEXTS, _BETWEEN_LINES = " ", "\n\n", "\n"
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

    try:
        commit, _ = hub.resolve(source.dataset, source.revision, "dataset")
    except hub.NoAnswer as error:
        # A commit cannot have changed since it was cached; a branch or tag can.
        commit, rows = source.revision, None
        if hub.is_commit(commit):
            rows = hub.cached_rows(source.dataset, source.config, source.split, commit)
        if rows is None:
            raise
        logger.warning("%s; taking the commit from the cache of datasets", error)
    else:
        with hub.hub_errors(source.dataset, source.revision, "dataset"):
            rows = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=commit)
    name = "/".join(part for part in (source.dataset, source.config, source.split) if part)
    _check_column(rows.column_names, source.column, name)
    return Texts(_all_text(rows[source.column], source.column, name), _BETWEEN_ROWS, name, commit)


def _file_texts(files: Sequence[Path], column: str) -> Texts:
    readers: dict[str, Callable[[Path, str], list[str]]] = {".jsonl": _json_rows, ".parquet": _parquet_rows}
    suffixes = [file.suffix.lower() for file in files]
    for file, suffix in zip(files, suffixes, strict=True):
        if suffix not in (".txt", *readers):
            raise ValueError(f"{file} is none of .txt, {', '.join(readers)}")
        if not file.is_file():
            raise FileNotFoundError(f"calibrate.source.paths: no file {file}")
    documents: list[str] = []
    separators = set()
    for file, suffix in zip(files, suffixes, strict=True):
        if suffix == ".txt":
            found, separator = _plain(_read_utf8(file), str(file))
        else:
            found, separator = readers[suffix](file, column), _BETWEEN_ROWS
        if not any(text.strip() for text in found):
            raise ValueError(f"{file} is empty: take it out of calibrate.source.paths")
        documents += found
        separators.add(separator)
    separator = next(between for between in (_BETWEEN_ROWS, _BETWEEN_TEXTS, _BETWEEN_LINES) if between in separators)
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return Texts(documents, separator, name, revisions.of_files(files))


def _read_utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}): convert it, with iconv for example") from error


def _plain(content: str, where: str) -> tuple[list[str], str]:
    """The documents of plain text and what joins them: blank lines separate them, or, where there are none, lines do."""
    paragraphs = [text.strip() for text in re.split(r"\n\s*\n", content) if text.strip()]
    lines = [line.strip() for line in content.split("\n") if line.strip()]
    if len(paragraphs) > 1 or len(lines) < 2:
        return paragraphs, _BETWEEN_TEXTS
    logger.info("%s has no blank lines: each of its %d lines is a document", where, len(lines))
    return lines, _BETWEEN_LINES


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
