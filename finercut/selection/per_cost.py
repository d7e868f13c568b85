"""The race for the candidate that raises the divergence least per unit of what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finercut.selection.race import Known, Outcome, Race, Totals
from finercut.sublayers import Candidate

# On SmolLM2-135M, nine in ten increases were at least 0.85 of those measured a step or more before; but for neighbours,
# all were at least 0.83.
LAZY_SHARE = 0.8
# Candidates in blocks that near to a removed one read a stream that changed: their increases fell to as little as 0.36.
NEIGHBOURS = 1


def carried_over(
    known: Known, removed: Candidate, before: Sequence[float], after: Sequence[float]
) -> dict[Candidate, list[float]]:
    """What candidates would come to after a removal if each still raised the divergence by as much.

    Candidates in the removed one's blocks, and in those beside them, are as if never evaluated.

    Args:
        before: D(R) on each window before the removal; `after`: D(R) after it.
    """
    blocks = {s.block for s in removed.sublayers}

    def near(candidate: Candidate) -> bool:
        return any(abs(s.block - block) <= NEIGHBOURS for s in candidate.sublayers for block in blocks)

    return {
        candidate: [total + a - b if total > 0 else 0.0 for total, b, a in zip(totals, before, after, strict=True)]
        for candidate, totals in known.items()
        if not near(candidate)
    }


@dataclass
class PerCost(Race):
    """As `Race`, with another idea of which candidate is the least: (D(R + s) - D(R)) / cost(s).

    A partial sum of D(R + s) is a lower bound of it, so of the ratio too: `exact` finds the least ratio. `lazy` takes
    `LAZY_SHARE` of the increase that a candidate caused in earlier steps for a lower bound of this step's; `known` is
    that whole increase on top of this step's D(R), see `carried_over`. A candidate that lowers the divergence has a
    negative ratio, and so comes before all that raise it. There is no `racing`.
    """

    base: Sequence[float] = ()
    """D(R) on each window, summed over its tokens."""
    cost: Mapping[Candidate, float] = field(default_factory=dict)
    """Above 0."""

    def __post_init__(self) -> None:
        if self.mode == "racing":
            raise ValueError("racing compares divergences, not their increase per unit of cost: use exact or lazy")
        super().__post_init__()
        self.base_total = math.fsum(self.base)

    def ratio(self, candidate: Candidate, total: float) -> float:
        """If the divergence without `candidate`, summed over the windows, comes to `total`."""
        return (total - self.base_total) / self.cost[candidate]

    def _earlier(self, candidate: Candidate) -> Sequence[float]:
        known = self._known(candidate)
        if self.mode != "lazy":
            return (0.0,) * self.n_windows
        return [
            min(total, base + LAZY_SHARE * (total - base)) if total > 0 else 0.0
            for total, base in zip(known, self.base, strict=True)
        ]

    def record(self, totals: Totals) -> None:
        for window, row in totals.items():
            for candidate, segments in row.items():
                self.done[candidate][window] = segments
        for candidate in sorted({c for row in totals.values() for c in row}):
            if self._complete(candidate) and self.ratio(candidate, self._sum(candidate)) < self.best:
                self.best, self.leader = self.ratio(candidate, self._sum(candidate)), candidate

    def outcome(self) -> Outcome:
        values = {c: self._sum(c) for c in self.done if self._complete(c)}
        given_up = {c: self._sum(c) for c in self.done if c not in values}
        abandoned = {c: total for c, total in given_up.items() if self.ratio(c, total) > self.best}
        return Outcome(
            values=values,
            abandoned=abandoned,
            stale={c: self._bound(c) for c in given_up if c not in abandoned},
            dropped={},
            largest_fall=max((self._fall(c) for c in values), default=0.0),
        )

    def margin(self) -> float | None:
        """How much less than its bound the divergence of a stale candidate would have to be for another removal.

        In the divergence of the one removed; None where there is no stale one.
        """
        stale = [self.ratio(c, bound) for c, bound in self.outcome().stale.items()]
        return (min(stale) - self.best) * self.cost[self.leader] if stale else None

    def _likely_least(self) -> Candidate | None:
        found: dict[Candidate, float] = {}
        for candidate in self.done:
            if seen := [w for w, total in enumerate(self._known(candidate)) if total > 0]:
                increase = math.fsum(self._known(candidate)[w] - self.base[w] for w in seen)
                found[candidate] = increase / len(seen) / self.cost[candidate]
        return min(found, key=lambda c: (found[c], c), default=None)

    def _alive(self) -> list[Candidate]:
        return [
            c
            for c, done in self.done.items()
            if len(done) < self.n_windows and self._whole(c) and not self.ratio(c, self._bound(c)) > self.best
        ]

    def _lead(self, candidate: Candidate) -> float:
        windows = self.done[candidate]
        base = math.fsum(self.base[w] for w in windows)
        ours = (self._sum(candidate) - base) / self.cost[candidate]
        return ours if self.leader is None else ours - (self._sum(self.leader, windows) - base) / self.cost[self.leader]

    def _limit(self, candidate: Candidate) -> float:
        if self.mode != "exact" or self.best == math.inf:
            return math.inf
        # What its divergence would be at the best ratio. A little more: rounding must not stop an equal one.
        return (self.base_total + self.best * self.cost[candidate]) * (1 + 1e-12) - self._bound(candidate)
