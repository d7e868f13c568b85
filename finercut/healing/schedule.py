"""The learning rate and the order of the windows in training."""

from __future__ import annotations

import math

import torch


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
