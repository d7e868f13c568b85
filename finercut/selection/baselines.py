"""The methods that FinerCut is compared with, on the same tokens, costs and budget.

Each is an order of candidates, from what it measures on the whole model; `Goal.take` cuts the order at the budget. The
stepwise ones, SLEB and BlockPruner, are greedy search by perplexity. Reimplemented from the papers' descriptions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from finercut.selection.bench import Bench
from finercut.selection.goal import Goal
from finercut.sublayers import Candidate, Sublayer, candidates, open_candidates, protected

Order = Callable[[Bench, Goal], list[Candidate]]

OBJECTIVES: Mapping[str, str] = {"sleb": "perplexity", "block_pruner": "perplexity"}
"""Stepwise methods that judge by something else than `search.divergence`.

SLEB: arXiv 2402.09025. BlockPruner: arXiv 2406.10594.
"""


def in_random_order(bench: Bench, goal: Goal) -> list[Candidate]:
    order = _pool(goal)
    random.Random(goal.settings.seed).shuffle(order)
    return order


def last_first(bench: Bench, goal: Goal) -> list[Candidate]:
    """Blocks from the output on."""
    return _pool(goal)[::-1]


def by_influence(bench: Bench, goal: Goal) -> list[Candidate]:
    """Those first that turn the residual stream least.

    Of blocks, ShortGPT's block influence (arXiv 2403.03853); of sublayers, LLM-Drop's similarity, attentions and MLPs
    in one order where both are candidates (arXiv 2406.15786).
    """
    return _ascending({c: influence(bench, c) for c in _pool(goal)})


def by_divergence_alone(bench: Bench, goal: Goal) -> list[Candidate]:
    """Each candidate alone: greedy search's first step, kept for all others."""
    pool = _pool(goal)
    totals = bench.totals({window: dict.fromkeys(pool, math.inf) for window in bench.deciding})
    return _ascending({c: math.fsum(x for row in totals.values() for x in row[c]) for c in pool})


def closest_window(bench: Bench, goal: Goal) -> list[Candidate]:
    """As many consecutive blocks as fit the budget: those which together turn the stream least at the last token.

    Source: Gromov et al., arXiv 2403.17887.
    """
    pool = _pool(goal)
    starts = range(len(pool))
    for n_blocks in range(goal.n_blocks - 1, 0, -1):
        windows = [w for start in starts if _follow(w := pool[start : start + n_blocks], n_blocks)]
        if fitting := [w for w in windows if goal.allows(w[:-1], w[-1])]:
            return min(fitting, key=lambda w: (angular_distance(bench, w), w))
    return []


ORDERS: Mapping[str, Order] = {
    "random": in_random_order,
    "last_blocks": last_first,
    "shortgpt": by_influence,
    "llm_drop": by_influence,
    "gromov": closest_window,
    "one_shot": by_divergence_alone,
}


def influence(bench: Bench, candidate: Candidate) -> float:
    """1 - cos of the stream before and after, mean over the calibration tokens: 0 where nothing turns."""
    return 1 - bench.mean(lambda w: _cosine(*_around(bench, candidate, w)).mean().item())


def angular_distance(bench: Bench, blocks: Sequence[Candidate]) -> float:
    """Of the stream before and after consecutive blocks, at the last token, in half turns; mean over the windows."""
    span = Candidate(tuple(s for block in blocks for s in block.sublayers))
    return bench.mean(lambda w: _cosine(*_around(bench, span, w))[-1].acos().item() / math.pi)


def _around(bench: Bench, candidate: Candidate, window: int) -> tuple[Tensor, Tensor]:
    first: Sublayer = candidate.sublayers[0]
    return bench.before(first, window), bench.after(candidate, window)


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    return cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1)


def _pool(goal: Goal) -> list[Candidate]:
    kept = protected(goal.settings.protect, goal.n_blocks)
    return open_candidates(candidates(goal.n_blocks, goal.settings.candidates), [], kept)


def _follow(window: Sequence[Candidate], n_blocks: int) -> bool:
    """Whether these are `n_blocks` blocks, each one the next."""
    indices = [block.sublayers[0].block for block in window]
    return len(window) == n_blocks and indices[-1] - indices[0] == n_blocks - 1


def _ascending(values: Mapping[Candidate, float]) -> list[Candidate]:
    return sorted(values, key=lambda c: (values[c], c))
