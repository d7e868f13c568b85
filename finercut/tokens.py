"""The token file that `calibrate` writes and every later stage reads; what texts begin with, and what they repeat."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE = "tokens.safetensors"
_WINDOWS = ("calibration", "held_out", "healing")
_METADATA = "finercut"  # one key: safetensors writes several in no fixed order
_N_GRAM = 4


def window_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that every text starts with, where the tokenizer puts one before a text by itself; else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("x").input_ids[:1] == [bos] else []


def repetition(text: Sequence[int]) -> float:
    """Share of a text's n-grams that were in it before; 0 where it is too short for two."""
    grams = Counter(tuple(text[i : i + _N_GRAM]) for i in range(len(text) - _N_GRAM + 1))
    return 1 - len(grams) / grams.total() if grams else 0.0


def passages(lengths: Sequence[int], n_tokens: int) -> list[int]:
    """Lengths, in turn, of the fewest passages that fill `n_tokens` when each is put twice; none of no lengths."""
    taken: list[int] = []
    if lengths:
        turns = cycle(lengths)
        while 2 * sum(taken) < n_tokens:
            taken.append(next(turns))
    return taken


def repeat(ids: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """`ids` cut into passages of these lengths, each put twice in a row.

    What predicts the second one is attention that copies from the context (induction; Olsson et al., arXiv 2209.11895),
    which plain text asks too little of to protect it.
    """
    row: list[int] = []
    begin = 0
    for length in lengths:
        passage = list(ids[begin : begin + length])
        row += passage + passage
        begin += length
    return row


def source_weights(sources: Sequence[str]) -> list[float]:
    """Weights of windows with which a sum over windows counts each source alike; 1 on average.

    Args:
        sources: of each window.
    """
    counts = Counter(sources)
    return [len(sources) / (len(counts) * counts[source]) for source in sources]


def by_source(values: Sequence[float], sources: Sequence[str]) -> dict[str, list[float]]:
    """The values of windows, for each source.

    Args:
        sources: of each window; empty where all are from one: that has no entry.
    """
    found = defaultdict(list)
    for source, value in zip(sources, values if sources else (), strict=True):
        found[source].append(value)
    return dict(found)


@dataclass(frozen=True)
class Tokens:
    """Token ids, (samples, tokens), int64, and where they are from."""

    calibration: Tensor
    """What the search sees."""
    held_out: Tensor
    """What neither the search nor healing is fitted to."""
    healing: Tensor | None = None
    """What healing is fitted to, from the same sources as the calibration windows; disjoint from all others."""
    calibration_sources: Tensor | None = None
    """(samples,) int64: which of `sources` each window was cut from. None: the first."""
    held_out_sources: Tensor | None = None
    healing_sources: Tensor | None = None
    sources: tuple[str, ...] = ("unknown",)
    """Names, for people."""
    unseen: tuple[str, ...] = ()
    """Those of `sources` that only held-out windows are from."""

    def __post_init__(self) -> None:
        for name, windows in self.named().items():
            if getattr(self, f"{name}_sources") is None:
                object.__setattr__(self, f"{name}_sources", torch.zeros(len(windows), dtype=torch.int64))

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
        return {name: windows for name in _WINDOWS if (windows := getattr(self, name)) is not None}

    def sources_of(self, name: str) -> tuple[str, ...]:
        """The source of each of the windows of this name; of none where all are from one."""
        indices = getattr(self, f"{name}_sources").tolist()
        return tuple(self.sources[i] for i in indices) if len(set(indices)) > 1 else ()

    @property
    def calibration_sha256(self) -> str:
        return sha256_of(self.calibration)

    @property
    def held_out_sha256(self) -> str:
        return sha256_of(self.held_out)

    @property
    def healing_sha256(self) -> str | None:
        return None if self.healing is None else sha256_of(self.healing)


def sha256_of(values: Tensor) -> str:
    """Of the shape and the token ids of windows."""
    shape = " ".join(map(str, values.shape))
    return hashlib.sha256(f"{shape}\n".encode() + values.numpy().astype("<i8").tobytes()).hexdigest()


def write_tokens(directory: Path, tokens: Tokens, provenance: dict[str, str]) -> None:
    """Write the token file; the same tokens and provenance give the same bytes."""
    windows = tokens.named()
    tensors = windows | {f"{name}_sources": getattr(tokens, f"{name}_sources") for name in windows}
    recorded = provenance | {"sources": tokens.sources, "unseen": tokens.unseen} | _hashes(tensors)
    save_file(tensors, directory / _FILE, {_METADATA: json.dumps(recorded)})


def _hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {f"{name}_sha256": sha256_of(values) for name, values in tensors.items()}


def load_tokens(directory: Path) -> Tokens:
    """Also files of version 0.1, which do not say where single windows are from: all are from one source.

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
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        hashes = {key: recorded[key] for key in _hashes(tensors)}
        sources = recorded.get("sources", [recorded.get("source", "unknown")])
        tokens = Tokens(**tensors, sources=tuple(sources), unseen=tuple(recorded.get("unseen", [])))
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a token file: run `finercut calibrate` again") from error
    if hashes != _hashes(tensors):
        raise ValueError(f"{file} is damaged, its tokens are not those recorded: run `finercut calibrate` again")
    for name, windows in tokens.named().items():
        if windows.dtype != torch.int64 or windows.dim() != 2 or not windows.numel() or windows.min() < 0:
            raise ValueError(f"{file} does not hold windows of tokens: run `finercut calibrate` again")
        origins = getattr(tokens, f"{name}_sources")
        if origins.dtype != torch.int64 or origins.shape != windows.shape[:1]:
            raise ValueError(f"{file} does not say where its windows are from: run `finercut calibrate` again")
        if origins.min() < 0 or origins.max() >= len(tokens.sources):
            raise ValueError(f"{file} names no source for some of its windows: run `finercut calibrate` again")
    return tokens
