"""The learning rate in training, and its windows and their order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finercut.tokens import passages, repeat

# Lengths of repeated passages, in turn.
PASSAGES = (4, 8, 16, 32)


def rate(done: float, warm_up: float) -> float:
    """The learning rate as a share of its highest, where a share `done` of the training is over."""
    if done < warm_up:
        return done / warm_up
    return (1 + math.cos(math.pi * min(1.0, (done - warm_up) / (1 - warm_up)))) / 2


def order(n_windows: int, n: int, seed: int) -> list[int]:
    """`n` indices of windows: all of them in a random order, then all again in another one."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(n_windows, generator=generator) for _ in range(math.ceil(n / n_windows))]
    return torch.cat(passes)[:n].tolist()


def with_repeated(windows: Tensor, share: float, seed: int) -> Tensor:
    """The windows, and behind them some made of the passages of others twice in a row, `share` of all.

    Args:
        windows: token ids, (samples, tokens). A first token that all of them have stays the first. Windows too short
            for any passage are repeated nothing of.
    """
    n_samples, n_tokens = windows.shape
    n = round(n_samples * share / (1 - share))
    start = int((windows[:, 0] == windows[0, 0]).all())
    # No passage so long that much of the window would be one without its repetition.
    lengths = passages([length for length in PASSAGES if 3 * length <= n_tokens - start], n_tokens - start)
    if not n or not lengths:
        return windows
    chosen = windows[order(n_samples, n, seed)].tolist()
    rows = [(row[:start] + repeat(row[start:], lengths))[:n_tokens] for row in chosen]
    return torch.cat([windows, windows.new_tensor(rows)])
