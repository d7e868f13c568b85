"""The token file that `calibrate` writes and every later stage reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FILE = "tokens.safetensors"
_METADATA = "finercut"  # one key: safetensors writes several in no fixed order


@dataclass(frozen=True)
class Tokens:
    """Token ids, (samples, tokens), int64."""

    calibration: Tensor
    """What the search sees."""
    held_out: Tensor
    """What neither the search nor healing is fitted to."""
    healing: Tensor | None = None
    """What healing is fitted to, from the same sources; disjoint from the held-out windows."""

    def check_vocabulary(self, vocab_size: int) -> None:
        """
        Raises:
            ValueError: a token is not the model's.
        """
        highest = max(int(windows.max()) for windows in self.named().values())
        if highest >= vocab_size:
            raise ValueError(
                f"the calibration set has token {highest}, the model knows {vocab_size}: run `finercut calibrate` again"
            )

    def named(self) -> dict[str, Tensor]:
        """The windows there are, by name."""
        every = {"calibration": self.calibration, "held_out": self.held_out, "healing": self.healing}
        return {name: windows for name, windows in every.items() if windows is not None}

    @property
    def calibration_sha256(self) -> str:
        return _sha256(self.calibration)

    @property
    def held_out_sha256(self) -> str:
        return _sha256(self.held_out)

    @property
    def healing_sha256(self) -> str | None:
        return None if self.healing is None else _sha256(self.healing)


def _sha256(windows: Tensor) -> str:
    shape = " ".join(map(str, windows.shape))
    return hashlib.sha256(f"{shape}\n".encode() + windows.numpy().astype("<i8").tobytes()).hexdigest()


def write_tokens(directory: Path, tokens: Tokens, provenance: dict[str, str]) -> None:
    """Write the token file; the same tokens and provenance give the same bytes."""
    named = tokens.named()
    hashes = {f"{name}_sha256": _sha256(windows) for name, windows in named.items()}
    save_file(named, directory / _FILE, {_METADATA: json.dumps(provenance | hashes)})


def load_tokens(directory: Path) -> Tokens:
    """
    Raises:
        FileNotFoundError: no token file there.
        ValueError: it was written by something else, or changed since.
    """
    file = directory / _FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: run `finercut calibrate` first")
    try:
        with safe_open(file, framework="pt") as stored:
            recorded = json.loads(stored.metadata()[_METADATA])
            tokens = Tokens(**{name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
            hashes = {name: recorded[f"{name}_sha256"] for name in tokens.named()}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a token file: run `finercut calibrate` again") from error
    for windows in tokens.named().values():
        if windows.dtype != torch.int64 or windows.dim() != 2 or not windows.numel() or windows.min() < 0:
            raise ValueError(f"{file} does not hold windows of tokens: run `finercut calibrate` again")
    if hashes != {name: _sha256(windows) for name, windows in tokens.named().items()}:
        raise ValueError(f"{file} is damaged, its tokens are not those recorded: run `finercut calibrate` again")
    return tokens
