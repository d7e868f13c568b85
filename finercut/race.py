"""Which candidates are evaluated on which windows, and which are given up: decisions, from numbers alone.

Nothing here knows how a divergence is computed. Whoever computes the parts, in one process or in many, gets the same
decisions from the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from finercut.sublayers import Candidate

Segments = tuple[float, ...]
"""Divergence of one candidate on one window, summed over each of its segments of so many tokens. There are fewer than
the window has where the candidate went over its limit."""
Part = Mapping[int, Mapping[Candidate, float]]
"""One pass through the depth: windows; on each, candidates by depth; for each, the limit: once its divergence there
comes to more, it cannot be the least."""
Totals = Mapping[int, Mapping[Candidate, Segments]]
"""What a part, or the share of it that one process has computed, came to."""


@dataclass(frozen=True)
class Outcome:
    """What the candidates of one step came to, in divergence summed over the windows."""

    values: dict[Candidate, float]
    """Those evaluated on every window."""
    abandoned: dict[Candidate, float]
    """Those given up on the way, with what they had come to: they are at least that."""
    not_evaluated: dict[Candidate, float]
    """Those never begun, with the bound that kept them out."""
    dropped: dict[Candidate, float]
    """Those of the abandoned that the test gave up, with how far it estimated them to be behind."""


@dataclass
class Race:
    """One step's candidates on their way through the windows.

    A candidate is given up as soon as what it has come to is more than another's whole value. That is exact:
    divergences are sums of terms that are never negative. The least value, and every value equal to it, is found.
    Two things that are not exact can be added.
    """

    candidates: Sequence[Candidate]
    n_windows: int
    n_segments: int
    """In a window."""
    abandon: bool = True
    first: Candidate | None = None
    """Evaluated before the others: a bound for them, and the lower the better."""
    earlier: Mapping[Candidate, Sequence[float]] = field(default_factory=dict)
    """Lazy: what candidates came to on each window in earlier steps, 0 where that is not known. Taken for lower bounds
    of what they would come to now, since divergence mostly grows as more is removed."""
    error_probability: float | None = None
    """Racing: a candidate is also given up when a paired t-test says that it is `behind`."""

    def __post_init__(self) -> None:
        self.done: dict[Candidate, dict[int, Segments]] = {c: {} for c in sorted(self.candidates)}
        self.dropped: dict[Candidate, float] = {}
        self.best = math.inf
        self.leader: Candidate | None = None

    def parts(self) -> Iterator[Part]:
        """What to evaluate next. Each part is to be recorded before the next one is asked for.

        First the one that is likely to be the least, to the end. Then all that are under way, on 1, 1, 2, 4, ...
        windows: most are given up early, the rest go through together.
        """
        if not self.abandon:
            yield self._part(list(self.done), self.n_windows)
            return
        if self.first is not None:
            yield self._part([self.first], self.n_windows)
        n_windows = 1
        for number in range(n_parts(self.n_windows)):
            if alive := self._alive():
                yield self._part(alive, n_windows)
            if front := self._front():
                yield self._part([front], self.n_windows)
            n_windows *= 2 if number else 1

    def record(self, totals: Totals) -> None:
        for window, row in totals.items():
            for candidate, segments in row.items():
                self.done[candidate][window] = segments
        for candidate in sorted({c for row in totals.values() for c in row}):
            if self._complete(candidate) and self._sum(candidate) < self.best:
                self.best, self.leader = self._sum(candidate), candidate
        if self.error_probability is not None:
            self._drop_those_behind(self.error_probability)

    def outcome(self) -> Outcome:
        begun = {c: self._sum(c) for c, done in self.done.items() if done}
        return Outcome(
            values={c: total for c, total in begun.items() if self._complete(c)},
            abandoned={c: total for c, total in begun.items() if not self._complete(c)},
            not_evaluated={c: self._bound(c) for c in self.done if c not in begun},
            dropped=dict(self.dropped),
        )

    def by_window(self, candidate: Candidate) -> list[float]:
        """What a candidate has come to on each window, now or else earlier: `earlier` for the next step.

        A window it was given up in counts with the more of the two: both are bounds.
        """
        before = self.earlier.get(candidate, [0.0] * self.n_windows)
        now = {w: math.fsum(segments) for w, segments in self.done[candidate].items()}
        whole = {w for w, segments in self.done[candidate].items() if len(segments) == self.n_segments}
        return [now[w] if w in whole else max(now.get(w, 0.0), before[w]) for w in range(self.n_windows)]

    def _part(self, candidates: Sequence[Candidate], n_windows: int) -> Part:
        """The next `n_windows` of each candidate: those it has never seen first, they tell most."""
        part: dict[int, dict[Candidate, float]] = {}
        for candidate in candidates:
            before = self.earlier.get(candidate, [0.0] * self.n_windows)
            left = [w for w in range(self.n_windows) if w not in self.done[candidate]]
            room = self._room(candidate)
            for window in sorted(left, key=lambda w: (before[w] > 0, w))[:n_windows]:
                part.setdefault(window, {})[candidate] = room + before[window]
        return part

    def _alive(self) -> list[Candidate]:
        """Those that may still be the least and are not complete, by depth."""
        return [
            c
            for c, done in self.done.items()
            if len(done) < self.n_windows
            and c not in self.dropped
            and self._whole(c)
            and not self._bound(c) > self.best
        ]

    def _front(self) -> Candidate | None:
        """The one in front, if it is ahead of the leader: likely to stay so, and then a lower bound for the others."""
        alive = [c for c in self._alive() if self.done[c]]
        front = min(alive, key=self._lead, default=None)
        return front if front and (self.leader is None or self._lead(front) < 0) else None

    def _lead(self, candidate: Candidate) -> float:
        """How much more than the leader a candidate has come to, on the windows it has seen."""
        leaders = 0.0 if self.leader is None else self._sum(self.leader, self.done[candidate])
        return self._sum(candidate) - leaders

    def _room(self, candidate: Candidate) -> float:
        if not self.abandon or self.best == math.inf:
            return math.inf
        # A little more than there is: rounding must not stop a candidate that would come to exactly as much.
        return self.best * (1 + 1e-12) - self._bound(candidate)

    def _sum(self, candidate: Candidate, windows: Iterable[int] | None = None) -> float:
        """Over the windows seen, or some of them; exactly rounded, so the same in whatever order they were done."""
        done = self.done[candidate]
        return math.fsum(x for w in (done if windows is None else windows) for x in done[w])

    def _bound(self, candidate: Candidate) -> float:
        """What is known of a candidate's whole value: windows seen as they are, the others as they were earlier."""
        done = self.done[candidate]
        unseen = (x for w, x in enumerate(self.earlier.get(candidate, ())) if w not in done)
        return math.fsum((*(x for segments in done.values() for x in segments), *unseen))

    def _complete(self, candidate: Candidate) -> bool:
        return len(self.done[candidate]) == self.n_windows and self._whole(candidate)

    def _whole(self, candidate: Candidate) -> bool:
        """Whether every window a candidate has seen was evaluated to its end."""
        return all(len(segments) == self.n_segments for segments in self.done[candidate].values())

    def _drop_those_behind(self, error_probability: float) -> None:
        if self.leader is None:
            return
        n_all = self.n_windows * self.n_segments
        # Each of the candidates might lead when one is tested, after each of the parts.
        n_tests = len(self.done) * (2 * n_parts(self.n_windows) + 1)
        for candidate in self._alive():
            theirs = self.done[self.leader]
            differences = [
                ours - leaders
                for window, segments in self.done[candidate].items()
                for ours, leaders in zip(segments, theirs[window], strict=True)
            ]
            if behind(differences, n_all, error_probability / n_tests):
                self.dropped[candidate] = math.fsum(differences) / len(differences) * n_all


def n_parts(n_windows: int) -> int:
    """In how many parts of 1, 1, 2, 4, ... windows the calibration set is worked through."""
    return 1 + math.ceil(math.log2(n_windows))


def behind(differences: Sequence[float], n_all: int, error_probability: float) -> bool:
    """One-sided paired t-test that the sum of `n_all` differences is above zero, from some of them.

    Those seen are taken for a random sample, without replacement, of all; their mean for normally distributed.

    Args:
        error_probability: the chance of saying so where the sum is zero or less.
    """
    n = len(differences)
    if n < 2 or n == n_all:
        return False
    mean = math.fsum(differences) / n
    if not 0 < mean < math.inf:
        return False
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    error_of_mean = math.sqrt(variance / n * (1 - n / n_all))
    return error_of_mean == 0 or t_tail(mean / error_of_mean, n - 1) < error_probability


def t_tail(t: float, degrees: int) -> float:
    """P(T > t) of Student's t, t >= 0: Simpson's rule over the angle whose tangent is t / sqrt(degrees)."""
    n_steps = 400
    low, high = math.atan(t / math.sqrt(degrees)), math.pi / 2
    width = (high - low) / n_steps
    heights = (abs(math.cos(low + i * width)) ** (degrees - 1) for i in range(n_steps + 1))
    weights = (1 if i in (0, n_steps) else 4 if i % 2 else 2 for i in range(n_steps + 1))
    area = width / 3 * sum(h * w for h, w in zip(heights, weights, strict=True))
    return area * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
