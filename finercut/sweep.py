"""Candidates evaluated as branches of one pass through the depth.

A candidate at depth d leaves the residual stream before d untouched. So the model as it stands is run once, its stream
kept at every depth (the trunk), and a candidate is a branch that starts from the trunk where its sublayer is and skips
it. All branches that are under way go through a sublayer as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finercut.blocks import Blocks, Unit
from finercut.divergence import Divergence, Reference
from finercut.families import Layout
from finercut.sublayers import Candidate, Sublayer
from finercut.workers import Workers

# Tokens that go through a sublayer at once. Larger ones spill out of the caches of CPUs and win nothing.
MICRO_BATCH_TOKENS = 2048
# Logits whose divergence is computed at once: 1 MiB in float32, which the caches of a core hold.
DIVERGENCE_LOGITS = 2**18


class Window:
    """One calibration window: the whole model's output on it, and the trunk of the model as it stands."""

    def __init__(self, blocks: Blocks, tokens: Tensor, divergence: Divergence, workers: Workers) -> None:
        """
        Args:
            tokens: ids, (tokens,)
        """
        self.blocks = blocks
        self.workers = workers
        self.divergence = divergence
        self.n_tokens = tokens.shape[0]
        states = blocks.embed(tokens[None])
        self.trunk = [states]
        """The stream before every unit, and after the last: (1, tokens, hidden) each."""
        for unit in blocks.units:
            states = blocks.run(unit, states, ())
            self.trunk.append(states)
        logits = blocks.logits(states)[0].float()
        if not logits.isfinite().all():
            raise ValueError("the whole model's logits are not finite on the calibration tokens; try float32")
        self.chunk = max(1, DIVERGENCE_LOGITS // logits.shape[-1])
        self.reference: list[Reference] = [divergence.reference(part) for part in logits.split(self.chunk)]

    def remove(self, removed: frozenset[Sublayer], first_unit: int) -> None:
        """Bring the trunk up to date once the sublayers up to `removed` are gone, the newest from `first_unit` on."""
        states = self.trunk[first_unit]
        for depth in range(first_unit, len(self.blocks.units)):
            states = self.blocks.run(self.blocks.units[depth], states, removed)
            self.trunk[depth + 1] = states

    def total(self, states: Tensor, limit: float = float("inf")) -> float:
        """Sum over the window's tokens of the divergence of a model that ends in `states`, (tokens, hidden).

        Stops early once the sum is over `limit`; what it returns then is over the limit too. A non-finite output is
        infinitely far.
        """
        logits = self.blocks.logits(states[None])[0]
        total = 0.0
        for reference, part in zip(self.reference, logits.split(self.chunk), strict=True):
            total += self.divergence.per_token(reference, part.float()).sum(dtype=torch.float64).item()
            if not total <= limit:
                break
        return total if total == total else float("inf")

    def branches(self, candidates: Sequence[tuple[int, Candidate]], removed: frozenset[Sublayer]) -> tuple[Tensor, int]:
        """Where the model ends without each candidate.

        Args:
            candidates: with the unit each starts at, by depth.

        Returns:
            (candidates, tokens, hidden), and the number of (sublayer, window) forwards it took
        """
        states = self.trunk[0].new_empty(len(candidates), *self.trunk[0].shape[1:])
        n_live = n_passes = 0
        for depth in range(candidates[0][0], len(self.blocks.units)):
            unit = self.blocks.units[depth]
            n_before = n_live
            while n_live < len(candidates) and candidates[n_live][0] == depth:
                states[n_live] = self.trunk[depth][0]
                n_live += 1
            # A whole block is a candidate of two units: at the second one, it is a branch that skips again.
            n_plain = n_before
            while n_plain > 0 and not set(unit.sublayers).isdisjoint(candidates[n_plain - 1][1].sublayers):
                n_plain -= 1
            n_passes += self._advance(unit, states[:n_plain], removed)
            for branch in range(n_plain, n_live):
                gone = removed.union(candidates[branch][1].sublayers)
                n_passes += self._advance(unit, states[branch : branch + 1], gone)
        return states, n_passes

    def _advance(self, unit: Unit, states: Tensor, removed: frozenset[Sublayer]) -> int:
        """Run `states` through a unit, in place; returns the number of forwards."""
        n_run = len(unit.kinds) - len(removed.intersection(unit.sublayers))
        if len(states) == 0 or (n_run == 0 and len(unit.kinds) == 1):
            return 0

        def run(batch: Tensor) -> None:
            batch.copy_(self.blocks.run(unit, batch, removed))

        fair_share = -(-len(states) // self.workers.n_threads)
        self.workers.map(run, states.split(min(fair_share, max(1, MICRO_BATCH_TOKENS // self.n_tokens))))
        return n_run * len(states)


@dataclass(frozen=True)
class Outcome:
    """What evaluating the candidates of one step came to, in mean divergence per token."""

    values: dict[Candidate, float]
    """Those evaluated on every window."""
    abandoned: dict[Candidate, float]
    """Those given up, with the lower bound they had reached."""
    sublayer_passes: int
    """(sublayer, window) forwards."""


class Sweep:
    """Evaluates candidates against the whole model on the calibration tokens, on top of earlier removals."""

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        tokens: Tensor,
        divergence: Divergence,
        removed: Iterable[Sublayer] = (),
    ) -> None:
        """
        Args:
            tokens: calibration token ids, (samples, tokens)
            removed: sublayers that are gone already, when a search is resumed.
        """
        tokens = tokens.to(model.device)
        self.workers = Workers(model.device)
        with torch.inference_mode():
            self.blocks = Blocks(model, layout, tokens[:1])
            self.windows = self.workers.map(
                lambda window: Window(self.blocks, window, divergence, self.workers), tokens
            )
        self.n_tokens = tokens.numel()
        self.removed: frozenset[Sublayer] = frozenset()
        self._start = {s: depth for depth, unit in enumerate(self.blocks.units) for s in unit.sublayers}
        if removed:
            self.remove(removed)

    @property
    def n_sublayers(self) -> int:
        return len(self._start) - len(self.removed)

    @torch.inference_mode()
    def remove(self, sublayers: Iterable[Sublayer]) -> None:
        """Make a removal for good: later candidates are judged on top of it."""
        new = frozenset(sublayers)
        self.removed |= new
        first = min(self._start[s] for s in new)
        self.workers.map(lambda window: window.remove(self.removed, first), self.windows)

    @torch.inference_mode()
    def divergence(self) -> float:
        """Of the model as it stands."""
        return sum(self.workers.map(lambda w: w.total(w.trunk[-1][0]), self.windows)) / self.n_tokens

    @torch.inference_mode()
    def evaluate(
        self, candidates: Sequence[Candidate], abandon: bool = True, progress: Callable[[], Any] = lambda: None
    ) -> Outcome:
        """Divergence of the model without each candidate.

        With `abandon`, a candidate is given up as soon as what it has come to is more than another's whole value.
        That is exact: divergences are sums of terms that are never negative. The least value, and every value at or
        below it, is always found.

        Args:
            progress: called after every window.
        """
        race = _Race(self, sorted(candidates), abandon)
        for window in range(len(self.windows)):
            race.run(window)
            progress()
        return race.outcome()

    def ends(self, window: int, group: Sequence[Candidate]) -> tuple[Tensor, int]:
        """Where the model ends on a window without each candidate of `group`, as `Window.branches` does."""
        return self.windows[window].branches([(self._start[c.sublayers[0]], c) for c in group], self.removed)


class _Race:
    """One step's candidates on their way through the windows."""

    def __init__(self, sweep: Sweep, candidates: Sequence[Candidate], abandon: bool) -> None:
        self.sweep = sweep
        self.abandon = abandon
        self.alive = list(candidates)
        self.sums = dict.fromkeys(candidates, 0.0)
        self.complete: set[Candidate] = set()
        self.best = float("inf")
        self.sublayer_passes = 0

    def run(self, window: int) -> None:
        """One window, for all that are alive."""
        if not self.alive:
            return
        ends, n_passes = self.sweep.ends(window, self.alive)
        self.sublayer_passes += n_passes
        totals = self.sweep.workers.map(
            lambda each: self.sweep.windows[window].total(each[1], self._left(each[0])),
            list(zip(self.alive, ends, strict=True)),
        )
        for candidate, total in zip(self.alive, totals, strict=True):
            self.sums[candidate] += total
        self._drop()
        if window == len(self.sweep.windows) - 1:
            for candidate in self.alive:
                self._finish(candidate)
        elif self.abandon and self.alive:
            self._run_ahead(min(self.alive, key=self.sums.__getitem__), window + 1)
        self._drop()

    def _run_ahead(self, candidate: Candidate, first: int) -> None:
        """All windows that are left, for the one in front: mostly it is in front at the end, a bound for the others."""
        left = self._left(candidate)

        def one(window: int) -> tuple[float, int]:
            ends, n_passes = self.sweep.ends(window, [candidate])
            return self.sweep.windows[window].total(ends[0], left), n_passes

        for total, n_passes in self.sweep.workers.map(one, range(first, len(self.sweep.windows))):
            self.sums[candidate] += total
            self.sublayer_passes += n_passes
        self.alive.remove(candidate)
        if self.sums[candidate] <= self.best:
            self._finish(candidate)

    def _left(self, candidate: Candidate) -> float:
        return self.best - self.sums[candidate] if self.abandon else float("inf")

    def _finish(self, candidate: Candidate) -> None:
        self.complete.add(candidate)
        self.best = min(self.best, self.sums[candidate])

    def _drop(self) -> None:
        if self.abandon:
            self.alive = [c for c in self.alive if not self.sums[c] > self.best]

    def outcome(self) -> Outcome:
        means = {c: total / self.sweep.n_tokens for c, total in self.sums.items()}
        return Outcome(
            values={c: mean for c, mean in means.items() if c in self.complete},
            abandoned={c: mean for c, mean in means.items() if c not in self.complete},
            sublayer_passes=self.sublayer_passes,
        )
