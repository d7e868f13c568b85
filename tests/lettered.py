"""Documents of a letter each, so that windows say which they were cut from."""

from __future__ import annotations

import string

import torch

from finercut.sources.texts import Texts
from finercut.sources.windows import Cut, cut_windows
from finercut.tokens import Tokens

# No token of the vocabulary spans two of these words, and none has two letters of the same.
LETTERS = [" ".join([letter.upper()] * 12) for letter in string.ascii_lowercase]


def letters_of(tokens: torch.Tensor, tokenizer) -> set[str]:
    return set(tokenizer.decode(tokens.flatten())) & set(string.ascii_uppercase)


def texts(documents: list[str], separator: str = " ") -> Texts:
    return Texts(documents, separator, "somewhere", "1")


def windows(source: Texts, tokenizer, n_tokens=8, n_samples=2, n_held_out_samples=2, shuffle_seed=None) -> Tokens:
    cut = Cut(source, n_samples, n_held_out_samples)
    return cut_windows([cut], tokenizer, n_tokens=n_tokens, shuffle_seed=shuffle_seed)
