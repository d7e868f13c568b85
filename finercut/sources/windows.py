"""Cuts calibration, held-out and healing windows from documents."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finercut.sources.files import TOKENIZER_FILES
from finercut.sources.texts import Texts
from finercut.tokens import Tokens, passages, repeat, window_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Where a text is cut off, its last tokens may be others than those of the whole text; these are never used.
_MARGIN = 64
# Of a first guess at how much text is needed.
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Cut:
    """A source's documents, and how many windows are cut from them."""

    texts: Texts
    n_samples: int
    n_held_out_samples: int
    n_healing_samples: int = 0
    repeated: Sequence[int] = ()
    """Lengths of the passages that windows repeat; see `repeat`."""


def cut_windows(
    cuts: Sequence[Cut], tokenizer: PreTrainedTokenizerBase, *, n_tokens: int, shuffle_seed: int | None
) -> Tokens:
    """Consecutive windows of `n_tokens`, BOS included. No document is cut for two uses, in whichever sources it is.

    The windows of the sources take turns, so that any number of the first ones has about the shares of all. A source
    without calibration windows is unseen.

    Args:
        shuffle_seed: shuffles the documents of each source; None keeps their order.

    Raises:
        ValueError: a source has too little text.
    """
    length = n_tokens - len(window_start(tokenizer))
    pools = [_Pool(cut, length, tokenizer, shuffle_seed) for cut in cuts]
    start = window_start(tokenizer)
    # Documents that differ may begin alike.
    seen: set[tuple[int, ...]] = set()
    calibration, calibration_sources = _in_turn(
        _take(pools, [cut.n_samples for cut in cuts], "calibration", seen), start
    )
    held_out, held_out_sources = _in_turn(
        _take(pools, [cut.n_held_out_samples for cut in cuts], "held-out", seen), start
    )
    # Last, so that the others do not depend on how much healing asks for.
    healing, healing_sources = _in_turn(_take(pools, [cut.n_healing_samples for cut in cuts], "healing", seen), start)
    sources = distinct([cut.texts.source + (", repeated" if cut.repeated else "") for cut in cuts])
    return Tokens(
        calibration,
        held_out,
        healing,
        calibration_sources,
        held_out_sources,
        healing_sources,
        sources,
        unseen=tuple(name for name, cut in zip(sources, cuts, strict=True) if not cut.n_samples),
    )


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names of sources, with a number where an earlier one has the same."""
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return tuple(f"{name} ({n})" if n > 1 else name for name, n in zip(names, counts, strict=True))


def _take(pools: Sequence[_Pool], counts: Sequence[int], use: str, seen: set[tuple[int, ...]]) -> list[list[list[int]]]:
    """Windows of each pool, from documents that nothing was cut from, also where it was in another pool.

    Args:
        seen: windows of other uses, which are passed over; these are added.
    """
    used = set[str]().union(*(pool.used for pool in pools))
    for pool in pools:
        pool.leave_out(used)
    taken = [pool.take(n, use, seen) for pool, n in zip(pools, counts, strict=True)]
    seen.update(tuple(row) for rows in taken for row in rows)
    return taken


def _in_turn(windows: Sequence[Sequence[list[int]]], start: list[int]) -> tuple[Tensor | None, Tensor | None]:
    """All windows, each with the index of its source; None where there are none."""
    places = sorted(
        ((position + 0.5) / len(of_source), source, position)
        for source, of_source in enumerate(windows)
        for position in range(len(of_source))
    )
    if not places:
        return None, None
    rows = [start + windows[source][position] for _, source, position in places]
    return torch.tensor(rows), torch.tensor([source for _, source, _ in places])


class _Pool:
    """The documents of a source that no window was cut from yet."""

    def __init__(self, cut: Cut, length: int, tokenizer: PreTrainedTokenizerBase, shuffle_seed: int | None) -> None:
        self.documents = list(cut.texts.documents)
        self.used: set[str] = set()
        self.texts, self.length, self.tokenizer = cut.texts, length, tokenizer
        self.passages = passages(cut.repeated, length)
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(self.documents)

    def leave_out(self, used: Collection[str]) -> None:
        self.documents = [document for document in self.documents if document.strip() not in used]

    def take(self, n: int, name: str, seen: Collection[tuple[int, ...]]) -> list[list[int]]:
        """`n` windows of the fewest first documents, which are used up.

        Args:
            seen: windows that are passed over.

        Raises:
            ValueError: there is too little text.
        """
        n_cut, fresh = n, list[list[int]]()
        while len(fresh) < n:
            rows, n_documents = self._rows(n_cut, n, name)
            fresh = [row for row in rows if tuple(row) not in seen]
            n_cut += n - len(fresh)
        if n:
            self.used.update(document.strip() for document in self.documents[:n_documents])
            self.documents = self.documents[n_documents:]
        return fresh

    def _rows(self, n_cut: int, n: int, name: str) -> tuple[list[list[int]], int]:
        """The first `n_cut` windows, for `n` that are asked for, and from how many documents they are."""
        of_text = sum(self.passages) or self.length
        needed = n_cut * of_text
        n_documents = _fewest(len(self.documents), lambda k: len(self._encode(k, needed)) >= needed)
        ids = self._encode(n_documents, needed)
        if len(ids) < needed:
            rest = {"held-out": " that calibration does not use", "healing": " that nothing else uses"}.get(name, "")
            alike = f", {n_cut - n} of them alike to others" if n_cut > n else ""
            raise ValueError(
                f"{self.texts.source} has {len(ids)} tokens in {len(self.documents)} documents{rest}, {n} {name} "
                f"windows need {needed}{alike}: give more text (blank lines separate the documents of a .txt file), or "
                "lower calibrate.n_samples, n_held_out_samples, n_healing_samples, n_tokens or its share"
            )
        rows = [ids[i * of_text : (i + 1) * of_text] for i in range(n_cut)]
        if self.passages:
            rows = [repeat(row, self.passages)[: self.length] for row in rows]
        return rows, n_documents

    def _encode(self, n_documents: int, needed: int) -> list[int]:
        return _first_ids(self.texts.separator.join(self.documents[:n_documents]), needed, self.tokenizer)


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
