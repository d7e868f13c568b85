"""Which candidates are evaluated on which windows, and which are given up: decisions, from numbers alone.

Nothing here knows how a divergence is computed. Whoever computes the parts, in one process or in many, gets the same
decisions from the same numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finercut.sublayers import Candidate


@dataclass(frozen=True)
class Part:
    """Candidates to evaluate on some windows: one pass through the depth."""

    candidates: tuple[Candidate, ...]
    """By depth."""
    windows: tuple[int, ...]
    limits: tuple[tuple[float, ...], ...]
    """Of each candidate on each window: once its divergence there comes to more, it cannot be the least."""


@dataclass(frozen=True)
class Total:
    """Divergence of one candidate on one window, summed over tokens."""

    value: float
    n_tokens: int
    """How many tokens it is over: fewer than the window has, where it went over its limit."""


@dataclass(frozen=True)
class Outcome:
    """What the candidates of one step came to, in divergence summed over the windows."""

    values: dict[Candidate, float]
    """Those evaluated on every window."""
    abandoned: dict[Candidate, float]
    """Those given up, with the lower bound they had reached."""


class Race:
    """One step's candidates on their way through the windows.

    A candidate is given up as soon as what it has come to is more than another's whole value. That is exact:
    divergences are sums of terms that are never negative. The least value, and every value equal to it, is found.
    """

    def __init__(self, candidates: Sequence[Candidate], n_windows: int, n_tokens: int, abandon: bool = True) -> None:
        """
        Args:
            n_tokens: in a window.
        """
        self.n_windows = n_windows
        self.n_tokens = n_tokens
        self.abandon = abandon
        self.totals: dict[Candidate, dict[int, Total]] = {c: {} for c in sorted(candidates)}
        self.best = math.inf

    def parts(self) -> Iterator[Part]:
        """What to evaluate next. Each part's totals are to be recorded before the next part is asked for.

        The one in front is sent ahead through all windows that are left: mostly it stays in front, and is then a
        bound for the others.
        """
        for windows in part_windows(self.n_windows):
            if not self.abandon:
                yield self._part(list(self.totals), windows)
                continue
            if alive := self._under_way():
                yield self._part(alive, windows)
            left = range(windows[-1] + 1, self.n_windows)
            if left and (alive := self._under_way()):
                yield self._part([min(alive, key=self.bound)], left)

    def record(self, part: Part, totals: Sequence[Sequence[Total]]) -> None:
        """
        Args:
            totals: of each of the part's candidates, on each of its windows.
        """
        for candidate, row in zip(part.candidates, totals, strict=True):
            self.totals[candidate].update(zip(part.windows, row, strict=True))
            if self._complete(candidate):
                self.best = min(self.best, self.bound(candidate))

    def bound(self, candidate: Candidate) -> float:
        """What a candidate has come to on the windows so far. The sum is the same in whatever order they were done."""
        return math.fsum(total.value for total in self.totals[candidate].values())

    def outcome(self) -> Outcome:
        bounds = {c: self.bound(c) for c in self.totals}
        return Outcome(
            values={c: bound for c, bound in bounds.items() if self._complete(c)},
            abandoned={c: bound for c, bound in bounds.items() if not self._complete(c)},
        )

    def _part(self, candidates: Sequence[Candidate], windows: Sequence[int]) -> Part:
        limits = [self.best - self.bound(c) if self.abandon else math.inf for c in candidates]
        return Part(tuple(candidates), tuple(windows), tuple((limit,) * len(windows) for limit in limits))

    def _under_way(self) -> list[Candidate]:
        return [
            c
            for c, totals in self.totals.items()
            if len(totals) < self.n_windows
            and all(total.n_tokens == self.n_tokens for total in totals.values())
            and not self.bound(c) > self.best
        ]

    def _complete(self, candidate: Candidate) -> bool:
        totals = self.totals[candidate]
        return len(totals) == self.n_windows and all(total.n_tokens == self.n_tokens for total in totals.values())


def part_windows(n_windows: int) -> list[range]:
    """The windows in parts of 1, 1, 2, 4, ...: most candidates are given up early, the rest go through together."""
    edges = [0, 1]
    while edges[-1] < n_windows:
        edges.append(min(2 * edges[-1], n_windows))
    return [range(start, end) for start, end in itertools.pairwise(edges)]
