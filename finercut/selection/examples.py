"""Labelled examples of one task, whose loss decides what is removed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finercut.tokens import window_start

HELD_OUT_SHARE = 1 / 4
# What a token of no answer is to predict: it does not count.
_NONE = -1


@dataclass(frozen=True)
class Examples:
    """Of each set, the deciding one and the held-out one: (examples, tokens)."""

    windows: tuple[Tensor, Tensor]
    """Token ids: prompt, answer, and zeros up to the longest example's length."""
    targets: tuple[Tensor, Tensor]
    """The id that each token is to predict where that is one of the answer's; -1 elsewhere."""

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in (*self.windows, *self.targets):
            digest.update(f"{tuple(part.shape)}\n".encode() + part.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase, most_tokens: int) -> Examples:
    """Examples from a .jsonl file; the last quarter of them is held out.

    A line is {"prompt": text, "answer": text} or {"prompt": text, "choices": [text, ...], "answer": index}. A space is
    put between prompt and answer where neither has any white space there.

    Args:
        most_tokens: that the model takes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no example, there are fewer than two, or one is too long.
    """
    if not path.is_file():
        raise FileNotFoundError(f"search.task: no file {path}")
    try:
        # Not splitlines: a text may have other separators of lines in it.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"search.task: {path} is not UTF-8 text: {error}") from error
    found = [
        _tokens(tokenizer, *_example(line, f"{path}:{number}"), f"{path}:{number}", most_tokens)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if len(found) < 2:
        raise ValueError(f"search.task: {path} has {len(found)} examples; at least 2 are needed, one of them held out")
    n_tokens = max(len(ids) for ids, _ in found)
    windows = torch.zeros(len(found), n_tokens, dtype=torch.long)
    targets = torch.full_like(windows, _NONE)
    for row, (ids, n_prompt) in enumerate(found):
        windows[row, : len(ids)] = torch.tensor(ids)
        targets[row, n_prompt - 1 : len(ids) - 1] = torch.tensor(ids[n_prompt:])
    n = len(found) - max(1, int(len(found) * HELD_OUT_SHARE))
    return Examples((windows[:n], windows[n:]), (targets[:n], targets[n:]))


def _example(line: str, where: str) -> tuple[str, str]:
    try:
        read: Any = json.loads(line)
        prompt, answer = read["prompt"], read["answer"]
        if "choices" in read:
            if not isinstance(read["choices"], list):
                raise ValueError("its choices are not a list")
            if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(read["choices"]):
                raise ValueError(f"answer {answer!r} is not the index of one of its choices")
            answer = read["choices"][answer]
        if not (isinstance(prompt, str) and isinstance(answer, str) and prompt.strip() and answer.strip()):
            raise ValueError("prompt and answer are texts, and not empty")
    except (KeyError, TypeError, ValueError) as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f'{where} is not an example, {{"prompt": ..., "answer": ...}} with or without "choices": {problem}'
        ) from error
    return prompt, answer if prompt[-1].isspace() or answer[0].isspace() else f" {answer}"


def _tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, where: str, most_tokens: int
) -> tuple[list[int], int]:
    """The example's ids, and how many of them are the prompt's."""
    start = window_start(tokenizer)
    ids = [start + tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, prompt + answer)]
    # Where the answer changes the prompt's last token, that token is the answer's.
    n_prompt = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    if n_prompt < 1 or n_prompt >= len(ids[1]):
        raise ValueError(f"{where}: the tokenizer leaves no token of the prompt before, or none of the answer after it")
    if len(ids[1]) > most_tokens:
        raise ValueError(f"{where} has {len(ids[1])} tokens, more than the model takes, {most_tokens}: shorten it")
    return ids[1], n_prompt
