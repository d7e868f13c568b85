"""Decides which candidates to evaluate next, and which to abandon. Pure logic: no tensors.

The same numbers give the same decisions, whether one process computes the divergences or several do.
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


Known = Mapping[Candidate, Sequence[float]]
"""What candidates came to on each window when they were last evaluated there; 0 where they never were."""

MODES = ("exact", "lazy", "racing", "brute")

# Of racing: the windows of a part, as a share of those before it. The test drops most early, so it is asked often.
RACING_GROWTH = 0.5
# Racing, whoever is in front goes on with the others until so much of the set is seen: before, it changes too often.
FRONT_SHARE = 1 / 8


@dataclass(frozen=True)
class Outcome:
    """What the candidates of one step came to, in divergence summed over the windows. Each is in one of the four."""

    values: dict[Candidate, float]
    """Those evaluated on every window."""
    abandoned: dict[Candidate, float]
    """Those given up because of what they had come to. It is the least they can be."""
    stale: dict[Candidate, float]
    """Those given up, or never begun, because of what they had come to in earlier steps: the bound that decided."""
    dropped: dict[Candidate, float]
    """Those given up by the test, with the estimate of their value."""
    largest_fall: float
    """The most by which a value of an earlier step turned out to be above the one of this step."""


@dataclass
class Race:
    """One step's candidates on their way through the windows. What makes a candidate be given up, by mode:

    - brute: nothing.
    - exact: its partial sum already exceeds another candidate's total. Divergences are sums of terms that are never
      negative, so the least value, and every value equal to it, is found.
    - lazy: also, what it came to in earlier steps on the windows it has not seen in this one. Divergence mostly grows
      as more is removed, so that is nearly a lower bound.
    - racing: also, a paired t-test says that it is `behind` the best that is complete, or the one in front.
    """

    candidates: Sequence[Candidate]
    n_windows: int
    n_segments: int
    """In a window."""
    mode: str = "exact"
    known: Known = field(default_factory=dict)
    """From earlier steps."""
    error_probability: float = 0.0
    """Racing: the chance, at most, that the test drops the candidate which is the least, in this step."""
    first_windows: int = 1
    """Of the first part."""

    def __post_init__(self) -> None:
        self.done: dict[Candidate, dict[int, Segments]] = {c: {} for c in sorted(self.candidates)}
        self.dropped: dict[Candidate, Candidate] = {}
        """By the test, and the candidate each was found to be worse than."""
        self.best = math.inf
        self.leader: Candidate | None = None

    def parts(self) -> Iterator[Part]:
        """What to evaluate next. Each part is to be recorded before the next one is asked for.

        First the one that is likely to be the least, to the end. Then all that are under way, on ever more windows at
        a time, see `part_sizes`: most are given up early, the rest go through together.
        """
        if self.mode == "brute":
            yield self._part(list(self.done), self.n_windows)
            return
        if first := self._likely_least():
            yield self._part([first], self.n_windows)
        growth = RACING_GROWTH if self.mode == "racing" else 1
        for n_windows in part_sizes(self.n_windows, self.first_windows, growth):
            if alive := self._alive():
                yield self._part(alive, n_windows)
            if front := self._front():
                yield self._part([front], self.n_windows)
        while alive := self._alive():  # taken back when the one that they were behind turned out to be infinitely far
            yield self._part(alive, self.n_windows)

    def record(self, totals: Totals) -> None:
        for window, row in totals.items():
            for candidate, segments in row.items():
                self.done[candidate][window] = segments
        for candidate in sorted({c for row in totals.values() for c in row}):
            if self._complete(candidate) and self._sum(candidate) < self.best:
                self.best, self.leader = self._sum(candidate), candidate
        if self.mode == "racing":
            self.dropped = {c: other for c, other in self.dropped.items() if self._sum(other) < math.inf}
            for other in filter(None, (self.leader, self._foremost())):
                self.dropped |= {c: other for c in self._alive() if c != other and self._behind(c, other)}

    def outcome(self) -> Outcome:
        values = {c: self._sum(c) for c in self.done if self._complete(c)}
        given_up = {c: self._sum(c) for c in self.done if c not in values}
        abandoned = {c: total for c, total in given_up.items() if total > self.best}
        return Outcome(
            values=values,
            abandoned=abandoned,
            stale={c: self._bound(c) for c in given_up if c not in abandoned and c not in self.dropped},
            dropped={c: self._estimate(c) for c in given_up if c not in abandoned and c in self.dropped},
            largest_fall=max((self._fall(c) for c in values), default=0.0),
        )

    def now_known(self) -> dict[Candidate, list[float]]:
        """`known` for the next step. Of a window that was not evaluated to its end, the larger: both are bounds."""
        now: dict[Candidate, list[float]] = {}
        for candidate, done in self.done.items():
            now[candidate] = list(self._known(candidate))
            for window, segments in done.items():
                total = math.fsum(segments)
                whole = len(segments) == self.n_segments
                now[candidate][window] = total if whole else max(total, now[candidate][window])
        return now

    @property
    def evaluations(self) -> int:
        """Candidates begun."""
        return sum(1 for done in self.done.values() if done)

    @property
    def segments(self) -> int:
        """Evaluated, over all candidates and windows."""
        return sum(len(segments) for done in self.done.values() for segments in done.values())

    def _known(self, candidate: Candidate) -> Sequence[float]:
        return self.known.get(candidate, (0.0,) * self.n_windows)

    def _earlier(self, candidate: Candidate) -> Sequence[float]:
        """What counts as a lower bound on each window."""
        return self._known(candidate) if self.mode in ("lazy", "racing") else (0.0,) * self.n_windows

    def _likely_least(self) -> Candidate | None:
        """The one that was least when last evaluated: its value will be a low bound for the others."""
        means = {
            c: math.fsum(self._known(c)) / n for c in self.done if (n := sum(total > 0 for total in self._known(c)))
        }
        return min(means, key=lambda c: (means[c], c), default=None)

    def _part(self, candidates: Sequence[Candidate], n_windows: int) -> Part:
        """The next windows of each candidate: lazy, those it has never seen first, they tell most; then those that
        told most of the leader."""
        told = self._told()
        part: dict[int, dict[Candidate, float]] = {}
        for candidate in candidates:
            earlier, limit = self._earlier(candidate), self._limit(candidate)
            left = [w for w in range(self.n_windows) if w not in self.done[candidate]]
            for window in sorted(left, key=lambda w: (earlier[w] > 0, -told[w]))[:n_windows]:
                part.setdefault(window, {})[candidate] = limit
        return part

    def _told(self) -> Sequence[float]:
        """How much the leader came to on each window beyond what counted as its lower bound there. Racing, windows are
        not chosen by what was found on them: its test takes them for a random sample."""
        if self.leader is None or self.mode == "racing":
            return (0.0,) * self.n_windows
        earlier = self._earlier(self.leader)
        return [self._sum(self.leader, [window]) - earlier[window] for window in range(self.n_windows)]

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

    def _foremost(self) -> Candidate | None:
        """Of those under way."""
        return min((c for c in self._alive() if self.done[c]), key=self._lead, default=None)

    def _front(self) -> Candidate | None:
        """The foremost, if it is ahead of the leader: likely to stay so, and then a low bound for the others."""
        front = self._foremost()
        if front is None or (self.leader is not None and self._lead(front) >= 0):
            return None
        if self.mode == "racing" and len(self.done[front]) < FRONT_SHARE * self.n_windows:
            return None
        return front

    def _lead(self, candidate: Candidate) -> float:
        """How much more than the leader a candidate has come to, on the windows it has seen."""
        leaders = 0.0 if self.leader is None else self._sum(self.leader, self.done[candidate])
        return self._sum(candidate) - leaders

    def _limit(self, candidate: Candidate) -> float:
        """Exact: what a candidate may come to on its next windows until it is given up. Lazy, a window that was begun
        is finished: the head costs less than the sublayers before it, and later steps know more."""
        if self.mode != "exact" or self.best == math.inf:
            return math.inf
        # A little more than that: rounding must not stop a candidate that would come to exactly as much.
        return self.best * (1 + 1e-12) - self._bound(candidate)

    def _sum(self, candidate: Candidate, windows: Iterable[int] | None = None) -> float:
        """Over the windows seen, or some of them; exactly rounded, so the same in whatever order they were done."""
        done = self.done[candidate]
        return math.fsum(x for w in (done if windows is None else windows) for x in done[w])

    def _bound(self, candidate: Candidate) -> float:
        """What a candidate has come to, with what it came to earlier on the windows it has not seen."""
        done = self.done[candidate]
        unseen = (total for window, total in enumerate(self._earlier(candidate)) if window not in done)
        return math.fsum((*(x for segments in done.values() for x in segments), *unseen))

    def _complete(self, candidate: Candidate) -> bool:
        return len(self.done[candidate]) == self.n_windows and self._whole(candidate)

    def _whole(self, candidate: Candidate) -> bool:
        """Whether every window a candidate has seen was evaluated to its end."""
        return all(len(segments) == self.n_segments for segments in self.done[candidate].values())

    def _fall(self, candidate: Candidate) -> float:
        known = self._known(candidate)
        return math.fsum(known) - self._sum(candidate, [w for w, total in enumerate(known) if total])

    def _differences(self, candidate: Candidate, other: Candidate) -> list[float]:
        """Between the two, on each segment that both have seen."""
        return [
            ours - theirs
            for window in self.done[candidate].keys() & self.done[other].keys()
            for ours, theirs in zip(self.done[candidate][window], self.done[other][window], strict=True)
        ]

    def _behind(self, candidate: Candidate, other: Candidate) -> bool:
        # The chance is shared out over all tests that could hit one candidate: with any other, whenever one is made.
        n_parts = sum(1 for _ in part_sizes(self.n_windows, 1, RACING_GROWTH))
        n_tests = len(self.done) * (2 * n_parts + 1)
        n_all = self.n_windows * self.n_segments
        return behind(self._differences(candidate, other), n_all, self.error_probability / n_tests)

    def _estimate(self, candidate: Candidate) -> float:
        differences = self._differences(candidate, self.leader)
        return self.best + math.fsum(differences) / len(differences) * self.n_windows * self.n_segments


def part_sizes(n_windows: int, first: int, growth: float) -> Iterator[int]:
    """Windows a part, until `n_windows` are done: `first` at least, or `growth` times as many as were done before.

    From 1, with a growth of 1: 1, 1, 2, 4, 8, ...; of 0.5: 1, 1, 1, 2, 3, 4, 6, 9, ...
    """
    done = 0
    while done < n_windows:
        size = max(first, math.ceil(growth * done))
        yield size
        done += size


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
    """P(T > t) of Student's t."""
    from scipy.special import stdtr  # racing alone needs it

    return float(stdtr(degrees, -t))
