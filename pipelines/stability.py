"""What `finercut stability` prints: how much the selection depends on the calibration windows.

The search of params.yaml is run on each half of them. It writes no artifacts; interrupted, it goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finercut.selection import distributed
from finercut.sublayers import Sublayer, parse

from .params import Params
from .search_job import Job, prepared, window_weights
from .search_methods import selected

ENOUGH = 0.7
"""Below this overlap, the calibration text is too little or too narrow."""


@dataclass(frozen=True)
class Half:
    """The search on half of the calibration windows."""

    removed: frozenset[Sublayer]
    held_out_divergence: float


def overlap(a: frozenset[Sublayer], b: frozenset[Sublayer]) -> float:
    """Jaccard's: sublayers that both remove, over those that either does."""
    return len(a & b) / len(a | b)


def run(params: Params) -> str:
    """
    Returns:
        What the two halves remove and how much of it they share, in lines.

    Raises:
        FileNotFoundError, ValueError: as the stage search; or there are no two halves to compare.
    """
    settings = params.search
    if settings.task is not None:
        raise ValueError(
            "stability compares halves of the calibration windows, but search.task decides: set it to null"
        )
    if settings.method in ("random", "last_blocks"):
        raise ValueError(f"stability: method {settings.method} looks at no windows; choose another")
    job = prepared(settings, params.prune.budget, distributed.ALONE)
    windows = job.tokens.calibration
    if len(windows) < 2:
        raise ValueError("stability needs two calibration windows; there is one: raise calibrate.n_samples")
    # In turn, of each source: neighbours may come from one document.
    in_turn = torch.argsort(job.tokens.calibration_sources, stable=True)
    halves = [_selected(job, in_turn[start::2]) for start in range(2)]
    return _text(halves, len(windows))


def _selected(job: Job, half: Tensor) -> Half:
    windows, sources = job.tokens.calibration[half], job.tokens.calibration_sources[half]
    tokens = replace(job.tokens, calibration=windows, calibration_sources=sources)
    changed = {"calibration_sha256": tokens.calibration_sha256, "window_weights": window_weights(tokens)}
    provenance = job.provenance.model_copy(update=changed)
    found = selected(replace(job, tokens=tokens, provenance=provenance))
    removed = frozenset(s for step in found.steps for s in parse(step.sublayer).sublayers)
    return Half(removed, found.steps[-1].held_out_divergence)


def _text(halves: list[Half], n_windows: int) -> str:
    first, second = halves
    shared = overlap(first.removed, second.removed)
    alone = [_names(one.removed - other.removed) for one, other in (halves, halves[::-1])]
    verdict = "stable" if shared >= ENOUGH else "take more text, or broader: calibrate.n_samples, calibrate.sources"
    return "\n".join(
        [
            f"overlap of the removed sublayers {shared:.2f}, {verdict}",
            f"  both halves of {n_windows} windows remove {_names(first.removed & second.removed)}",
            f"  only the first removes {alone[0]}; held-out divergence {first.held_out_divergence:.4f}",
            f"  only the second removes {alone[1]}; held-out divergence {second.held_out_divergence:.4f}",
        ]
    )


def _names(sublayers: frozenset[Sublayer]) -> str:
    return ", ".join(map(str, sorted(sublayers))) or "none"
