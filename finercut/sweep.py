"""Candidates evaluated as branches of one pass through the depth.

A candidate at depth d leaves the residual stream before d untouched. So the model as it stands is run once, its stream
kept at every depth (the trunk), and a candidate is a branch that starts from the trunk where its sublayer is and skips
it. All branches of all windows that are under way go through a sublayer before any goes through the next.

What comes out for a candidate on a window depends on the other candidates beside it in a micro-batch (in the last bits)
but never on other windows: they may be computed elsewhere.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from finercut.blocks import Blocks, Unit
from finercut.divergence import Divergence, Reference
from finercut.race import Total
from finercut.sublayers import Candidate, Sublayer
from finercut.workers import Workers

# Tokens that go through a sublayer at once. Larger ones spill out of the caches of CPUs and win nothing.
MICRO_BATCH_TOKENS = 2048
# Logits that exist at once for a worker.
HEAD_LOGITS = 2**22
# Logits whose divergence is computed at once: 1 MiB in float32, which the caches of a core hold.
DIVERGENCE_LOGITS = 2**18


class Sweep:
    """The windows of a search: the whole model's output on them, and the trunk of the model as it stands."""

    def __init__(
        self,
        blocks: Blocks,
        tokens: Tensor,
        divergence: Divergence,
        workers: Workers,
        removed: Iterable[Sublayer] = (),
    ) -> None:
        """
        Args:
            tokens: ids, (windows, tokens), on the model's device.
            removed: sublayers that are gone already, when a search is resumed.

        Raises:
            ValueError: the whole model's logits are not finite.
        """
        self.blocks = blocks
        self.workers = workers
        self.divergence = divergence
        self.n_windows, self.n_tokens = tokens.shape
        self.removed: frozenset[Sublayer] = frozenset()
        self._start = {s: depth for depth, unit in enumerate(blocks.units) for s in unit.sublayers}
        with torch.inference_mode():
            embedded = torch.cat(workers.map(lambda window: blocks.embed(window[None]), tokens))
            self.trunk = [embedded] * (len(blocks.units) + 1)
            """The stream before every unit, and after the last: (windows, tokens, hidden) each."""
            self._run_trunk(0)
            self.references: list[Reference] = workers.map(self._reference, self.trunk[-1])
        if removed:
            self.remove(removed)

    @torch.inference_mode()
    def remove(self, sublayers: Iterable[Sublayer]) -> None:
        """Make a removal for good: later candidates are judged on top of it."""
        new = frozenset(sublayers)
        self.removed |= new
        self._run_trunk(min(self._start[s] for s in new))

    def passes(self, candidate: Candidate) -> int:
        """Sublayers a branch without `candidate` goes through on one window."""
        gone = self.removed.union(candidate.sublayers)
        return sum(s not in gone for unit in self.blocks.units[self._depth(candidate) :] for s in unit.sublayers)

    @torch.inference_mode()
    def divergences(self, windows: Sequence[int]) -> list[float]:
        """Of the model as it stands, summed over the tokens of each window."""
        ends = self.trunk[-1]
        totals = self.workers.map(lambda w: self._totals(self.references[w], ends[w][None], [math.inf]), windows)
        return [total.value for (total,) in totals]

    @torch.inference_mode()
    def totals(
        self, candidates: Sequence[Candidate], windows: Sequence[int], limits: Sequence[Sequence[float]]
    ) -> list[list[Total]]:
        """Divergence of the model without each candidate, on each window. Each sublayer's weights are used once.

        Args:
            candidates: by depth.
            limits: of each candidate on each window. A sum that goes over it is not finished; a non-finite output is
                infinitely far.
        """
        ends = self._ends(candidates, windows)

        def one(place: tuple[int, int]) -> Total:
            branch, at = place
            return self._totals(self.references[windows[at]], ends[at, branch][None], [limits[branch][at]])[0]

        places = [(branch, at) for branch in range(len(candidates)) for at in range(len(windows))]
        totals = self.workers.map(one, places)
        return [totals[i : i + len(windows)] for i in range(0, len(totals), len(windows))]

    def _run_trunk(self, first: int) -> None:
        for depth in range(first, len(self.blocks.units)):
            states = self.trunk[depth].clone()
            self._advance(self.blocks.units[depth], states.split(1), self.removed)
            self.trunk[depth + 1] = states

    def _ends(self, candidates: Sequence[Candidate], windows: Sequence[int]) -> Tensor:
        """Where the model without each candidate ends: (windows, candidates, tokens, hidden)."""
        starts = [self._depth(c) for c in candidates]
        states = self.trunk[0].new_empty(len(windows), len(candidates), *self.trunk[0].shape[1:])
        per_batch = max(1, MICRO_BATCH_TOKENS // self.n_tokens)
        for depth in range(starts[0], len(self.blocks.units)):
            unit = self.blocks.units[depth]
            first_new, n_live = bisect_left(starts, depth), bisect_right(starts, depth)
            if first_new < n_live:
                states[:, first_new:n_live] = self.trunk[depth][list(windows)].unsqueeze(1)
            # A whole block is a candidate of two units: at the second one, it is a branch that skips again.
            n_plain = first_new
            while n_plain > 0 and not set(unit.sublayers).isdisjoint(candidates[n_plain - 1].sublayers):
                n_plain -= 1
            plain = [batch for window in states for batch in window[:n_plain].split(per_batch) if len(batch)]
            self._advance(unit, plain, self.removed)
            for branch in range(n_plain, n_live):
                gone = self.removed.union(candidates[branch].sublayers)
                self._advance(unit, [window[branch : branch + 1] for window in states], gone)
        return states

    def _advance(self, unit: Unit, batches: Sequence[Tensor], removed: frozenset[Sublayer]) -> None:
        """Run (branches, tokens, hidden) states through a unit, in place."""
        if len(unit.kinds) > 1 or not removed.issuperset(unit.sublayers):
            self.workers.map(lambda batch: batch.copy_(self.blocks.run(unit, batch, removed)), batches)

    def _depth(self, candidate: Candidate) -> int:
        return self._start[candidate.sublayers[0]]

    def _reference(self, states: Tensor) -> Reference:
        pieces: list[Reference] = []
        for logits in self._logits(states[None]):
            if not logits.isfinite().all():
                raise ValueError("the whole model's logits are not finite on the calibration tokens; try float32")
            pieces.append(self.divergence.reference(logits[0]))
        return tuple(map(torch.cat, zip(*pieces, strict=True)))

    def _logits(self, states: Tensor) -> Iterable[Tensor]:
        """Float32 logits of (branches, tokens, hidden) states in pieces: (branches, tokens, vocab) each."""
        vocabulary = self.blocks.model.config.vocab_size
        per_head = max(1, HEAD_LOGITS // (vocabulary * len(states)))
        per_piece = max(1, DIVERGENCE_LOGITS // (vocabulary * len(states)))
        for part in states.split(per_head, dim=1):
            yield from (piece.float() for piece in self.blocks.logits(part).split(per_piece, dim=1))

    def _totals(self, reference: Reference, states: Tensor, limits: Sequence[float]) -> list[Total]:
        total, n_tokens = 0.0, 0
        for logits in self._logits(states):
            piece = slice(n_tokens, n_tokens + logits.shape[1])
            values = self.divergence.per_token(tuple(kept[piece] for kept in reference), logits)
            total += values.sum(dtype=torch.float64).item()
            n_tokens += logits.shape[1]
            if not total <= limits[0]:
                break
        return [Total(total if total == total else math.inf, n_tokens)]
