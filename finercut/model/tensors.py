"""Names, shapes and dtypes in a directory's safetensors files, from their headers, and hashes of the files."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from finercut.model.configs import read_object, write_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
"""Names of files with weights that can run code when they are loaded."""
_CHUNK = 1 << 24
"""Bytes of a file in memory at once."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    shape: tuple[int, ...]
    dtype: str
    """In safetensors' spelling: BF16, F16, F32, ..."""
    nbytes: int

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


def is_weights(name: str) -> bool:
    """Whether a file beside config.json is one of weights, in whatever form, or an index of such."""
    return any(fnmatch(name.removesuffix(".index.json"), form) for form in ("*.safetensors", "*.gguf", *PICKLED))


def safetensors_files(directory: Path) -> list[Path]:
    """Those that transformers loads: the one file, or the shards that the index names. Sorted by name.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the index is damaged.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    files = sorted(directory.glob("*.safetensors"))
    if index.is_file():
        named = shards(index)
        files = [file for file in files if file.name in named]
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {directory}")
    return files


def shards(index: Path) -> set[str]:
    """The names of the files that an index names.

    Raises:
        ValueError: it is damaged, or names no files.
    """
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict):
        raise ValueError(f"{index.name} has no weight_map")
    return {str(shard) for shard in named.values()}


def safetensors_shapes(directory: Path) -> dict[str, StoredTensor]:
    """Every stored tensor by name. A tied weight is stored, and so counted, once.

    Raises:
        FileNotFoundError: no safetensors files there.
        ValueError: a file is cut short or is no safetensors file, or two files store the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in safetensors_files(directory):
        try:
            with safe_open(file, framework="numpy") as stored:
                tensors = {name: _stored(stored.get_slice(name)) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file, or was cut short or damaged: {error}") from error
        for name, tensor in tensors.items():
            if name in found:
                raise ValueError(f"{name} is stored twice in {directory}, the second time in {file.name}")
            found[name] = tensor
    return found


def _stored(view: Any) -> StoredTensor:
    shape, dtype = tuple(view.get_shape()), view.get_dtype()
    bits = re.search(r"\d+", dtype)  # F8_E4M3 has 8; BOOL, without a number, is stored as a byte
    return StoredTensor(shape, dtype, prod(shape) * int(bits[0] if bits else 8) // 8)


def weights_bytes(directory: Path) -> int:
    """Total size of the safetensors files, headers included."""
    return sum(file.stat().st_size for file in safetensors_files(directory))


def weights_sha256(directory: Path, names: Iterable[str] | None = None) -> str:
    """Hash over the sorted names and contents of the safetensors files; the same files give the same hash anywhere.

    Args:
        names: of the files that count; all by default
    """
    digest = hashlib.sha256()
    for file in safetensors_files(directory) if names is None else sorted(directory / name for name in names):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def copy_tensors(source: Path, names: Collection[str], directory: Path) -> None:
    """Write stored tensors of a model's directory, bit for bit, into files of the same names in another directory.

    A chunk of a file at a time is in memory. A file none of whose tensors is in `names` is left out.

    Args:
        names: of the tensors; all are stored in `source`.
        directory: has no weights.
    """
    weight_map: dict[str, str] = {}
    n_bytes = 0
    for file in safetensors_files(source):
        with file.open("rb") as stored:
            (start,) = struct.unpack("<Q", stored.read(8))
            header = json.loads(stored.read(start))
            taken = {name: entry for name, entry in header.items() if name in names}
            if taken:
                n_bytes += _copy(stored, 8 + start, taken, directory / file.name)
        weight_map |= dict.fromkeys(taken, file.name)
    if set(weight_map.values()) != {WEIGHTS}:
        index = {"metadata": {"total_size": n_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_object(directory / INDEX, index)


def rename(directory: Path, old: str, new: str) -> None:
    """Give a stored tensor of a model another name. No file is written in place: those of a cache are links to it."""
    for file in safetensors_files(directory):
        partial = file.with_name(f"{file.name}.partial")
        with file.open("rb") as stored:
            (start,) = struct.unpack("<Q", stored.read(8))
            header = json.loads(stored.read(start))
            if old not in header:
                continue
            header.pop("__metadata__", None)
            _copy(stored, 8 + start, {new if name == old else name: of for name, of in header.items()}, partial)
        partial.replace(file)
    if (index := directory / INDEX).is_file():
        content = read_object(index)
        content["weight_map"] = {new if name == old else name: of for name, of in content["weight_map"].items()}
        write_object(index, content)


def _copy(stored: BinaryIO, start: int, entries: dict[str, dict[str, Any]], target: Path) -> int:
    """Write a file of the tensors that `entries` of another file's header describe; returns their bytes.

    Args:
        start: of the data in `stored`, bytes.
    """
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
    # As safetensors orders them: those with larger numbers first, so that each begins at a multiple of its numbers'
    # size.
    order = sorted(entries, key=lambda name: (-sizes[name] // max(prod(entries[name]["shape"]), 1), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        header[name] = entries[name] | {"data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as written:
        written.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            stored.seek(start + entries[name]["data_offsets"][0])
            left = sizes[name]
            while left:
                chunk = stored.read(min(left, _CHUNK))
                written.write(chunk)
                left -= len(chunk)
    return end
