"""What a directory's safetensors files hold, from their headers: no tensor is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: BF16, F16, F32, ..."""
    nbytes: int

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


def safetensors_files(directory: Path) -> list[Path]:
    """Sorted by name.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {directory}")
    return files


def safetensors_shapes(directory: Path) -> dict[str, StoredTensor]:
    """Every stored tensor by name. A tied weight is stored, and so counted, once.

    Raises:
        FileNotFoundError: no safetensors files there.
        ValueError: a file is cut short or is no safetensors file, or two files store the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in safetensors_files(directory):
        for name, entry in _header(file).items():
            if name in found:
                raise ValueError(f"{name} is stored twice in {directory}, the second time in {file.name}")
            start, end = entry["data_offsets"]
            found[name] = StoredTensor(tuple(entry["shape"]), entry["dtype"], end - start)
    return found


def _header(file: Path) -> dict[str, dict]:
    # Once safetensors has checked the header, and its offsets against the file's size, it is read again for the dtypes
    # as they are stored: 8 bytes of length, then JSON, is the whole format.
    try:
        with safe_open(file, framework="numpy"), file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or was cut short or damaged: {error}") from error
    header.pop("__metadata__", None)
    return header


def weights_bytes(directory: Path) -> int:
    """Of the safetensors files, headers included."""
    return sum(file.stat().st_size for file in safetensors_files(directory))


def weights_sha256(directory: Path) -> str:
    """Over the sorted names and contents of the safetensors files: the same weights give the same one anywhere."""
    digest = hashlib.sha256()
    for file in safetensors_files(directory):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
