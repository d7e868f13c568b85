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
    """What the search sees, and what it never sees: token ids, (samples, tokens), int64."""

    calibration: Tensor
    held_out: Tensor

    def check_vocabulary(self, vocab_size: int) -> None:
        """
        Raises:
            ValueError: a token is not the model's.
        """
        highest = max(int(self.calibration.max()), int(self.held_out.max()))
        if highest >= vocab_size:
            raise ValueError(
                f"the calibration set has token {highest}, the model knows {vocab_size}: run `finercut calibrate` again"
            )

    @property
    def calibration_sha256(self) -> str:
        return _sha256(self.calibration)

    @property
    def held_out_sha256(self) -> str:
        return _sha256(self.held_out)


def _sha256(windows: Tensor) -> str:
    shape = " ".join(map(str, windows.shape))
    return hashlib.sha256(f"{shape}\n".encode() + windows.numpy().astype("<i8").tobytes()).hexdigest()


def write_tokens(directory: Path, tokens: Tokens, provenance: dict[str, str]) -> None:
    """Write the token file; the same tokens and provenance give the same bytes."""
    hashes = {"calibration_sha256": tokens.calibration_sha256, "held_out_sha256": tokens.held_out_sha256}
    save_file(
        {"calibration": tokens.calibration, "held_out": tokens.held_out},
        directory / _FILE,
        {_METADATA: json.dumps(provenance | hashes)},
    )


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
            hashes = recorded["calibration_sha256"], recorded["held_out_sha256"]
            tokens = Tokens(stored.get_tensor("calibration"), stored.get_tensor("held_out"))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a token file: run `finercut calibrate` again") from error
    for windows in (tokens.calibration, tokens.held_out):
        if windows.dtype != torch.int64 or windows.dim() != 2 or not windows.numel() or windows.min() < 0:
            raise ValueError(f"{file} does not hold windows of tokens: run `finercut calibrate` again")
    if hashes != (tokens.calibration_sha256, tokens.held_out_sha256):
        raise ValueError(f"{file} is damaged, its tokens are not those recorded: run `finercut calibrate` again")
    return tokens
