"""Cuts calibration and held-out windows from documents."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finercut.sources.files import TOKENIZER_FILES
from finercut.sources.texts import Texts
from finercut.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Where a text is cut off, its last tokens may be others than those of the whole text; these are never used.
_MARGIN = 64
# Of a first guess at how much text is needed.
_CHARACTERS_PER_TOKEN = 8


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

    def encode(n_documents: int, needed: int) -> list[int]:
        return _first_ids(texts.separator.join(documents[:n_documents]), needed, tokenizer)

    windows = []
    for name, n in (("calibration", n_samples), ("held-out", n_held_out_samples)):
        n_documents = _fewest(len(documents), lambda k, needed=n * length: len(encode(k, needed)) >= needed)
        ids = encode(n_documents, n * length)
        if len(ids) < n * length:
            rest = " that calibration does not use" if name == "held-out" else ""
            raise ValueError(
                f"{texts.source} has {len(ids)} tokens in {len(documents)} documents{rest}, {n} {name} windows need "
                f"{n * length}: give more text (blank lines separate the documents of a .txt file), or lower "
                "calibrate.n_samples, n_held_out_samples or n_tokens"
            )
        windows.append(torch.tensor([start + ids[i * length : (i + 1) * length] for i in range(n)]))
        seen = set(documents[:n_documents])
        documents = [d for d in documents[n_documents:] if d not in seen]
    return Tokens(*windows)


def _first_ids(text: str, needed: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """At least the first `needed` tokens of `text`, or all of them: of a long text only a beginning is tokenised."""
    enough = needed + _MARGIN
    n_characters = _CHARACTERS_PER_TOKEN * enough
    while True:
        ids = tokenizer(text[:n_characters], add_special_tokens=False, verbose=False).input_ids
        if n_characters >= len(text) or len(ids) >= enough:
            return ids
        n_characters *= 2


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
