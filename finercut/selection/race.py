"""Decides which candidates to evaluate next, and which to abandon. Pure logic: no tensors.

The same numbers give the same decisions, whether one process computes the divergences or several do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from finercut.sublayers import Candidate

Segments = tuple[float, ...]
"""Divergence of one candidate on one window, summed over each of its segments of so many tokens. Fewer than the
window has where the candidate exceeded its limit."""
Part = Mapping[int, Mapping[Candidate, float]]
"""One pass through the depth: for each window, its candidates by depth; for each of these, its limit. A candidate whose
divergence on the window exceeds the limit cannot be the least."""
Totals = Mapping[int, Mapping[Candidate, Segments]]
"""Divergences of a part, or of the share of it that one process computed."""


Known = Mapping[Candidate, Sequence[float]]
"""Each candidate's divergence on each window when it was last evaluated there; 0 where it never was."""

MODES = ("exact", "lazy", "racing", "brute")

# Racing: windows of a part, as a share of those before it. The test drops most candidates early, so it runs often.
RACING_GROWTH = 0.5
# Racing: share of the windows after which the front candidate may run ahead; before, the front changes too often.
FRONT_SHARE = 1 / 8


@dataclass(frozen=True)
class Outcome:
    """Divergences of one step's candidates, summed over the windows. Each candidate is in one of the four."""

    values: dict[Candidate, float]
    """Those evaluated on every window."""
    abandoned: dict[Candidate, float]
    """Those abandoned for their partial sum, which is a lower bound."""
    stale: dict[Candidate, float]
    """Those abandoned, or never begun, for their values of earlier steps, with the bound that decided."""
    dropped: dict[Candidate, float]
    """Those that the test dropped, with an estimate of their value."""
    largest_fall: float
    """The most by which an earlier step's value exceeds this step's."""


@dataclass
class Race:
    """One step's candidates and their divergences on the windows so far. A candidate is abandoned, by mode:

    - brute: never.
    - exact: when its partial sum already exceeds another candidate's total. Divergences are sums of non-negative terms,
      so the least value, and every value equal to it, is found.
    - lazy: also when the sum exceeds it with earlier steps' values for the windows not yet seen in this one. Divergence
      mostly grows as more is removed, so earlier values are nearly lower bounds.
    - racing: also when a paired t-test finds it `behind` the best complete candidate, or the front one.
    """

    candidates: Sequence[Candidate]
    n_windows: int
    n_segments: int
    """In a window."""
    mode: str = "exact"
    known: Known = field(default_factory=dict)
    """From earlier steps."""
    error_probability: float = 0.0
    """Racing: upper bound on the probability that the test drops this step's least candidate."""
    first_windows: int = 1
    """Of the first part."""

    def __post_init__(self) -> None:
        self.done: dict[Candidate, dict[int, Segments]] = {c: {} for c in sorted(self.candidates)}
        self.dropped: dict[Candidate, Candidate] = {}
        """By the test, each with the candidate that it was found to be worse than."""
        self.best = math.inf
        self.leader: Candidate | None = None

    def parts(self) -> Iterator[Part]:
        """What to evaluate next. Record each part before asking for the next.

        First the candidate that is likely to be the least, on all windows. Then all live ones, on ever more windows at
        a time (`part_sizes`): most are abandoned early, the rest advance together.
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
        while alive := self._alive():  # dropped ones return if the one that they were behind is infinitely far
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
        """`known` for the next step. The larger of the two where a window was not finished: both are lower bounds."""
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
        """Number of candidates begun."""
        return sum(1 for done in self.done.values() if done)

    @property
    def segments(self) -> int:
        """Number of segments evaluated, over all candidates and windows."""
        return sum(len(segments) for done in self.done.values() for segments in done.values())

    def _known(self, candidate: Candidate) -> Sequence[float]:
        return self.known.get(candidate, (0.0,) * self.n_windows)

    def _earlier(self, candidate: Candidate) -> Sequence[float]:
        """The lower bound on each window that the mode assumes."""
        return self._known(candidate) if self.mode in ("lazy", "racing") else (0.0,) * self.n_windows

    def _likely_least(self) -> Candidate | None:
        """The candidate that was least when last evaluated: its total will rule out many others."""
        means = {
            c: math.fsum(self._known(c)) / n for c in self.done if (n := sum(total > 0 for total in self._known(c)))
        }
        return min(means, key=lambda c: (means[c], c), default=None)

    def _part(self, candidates: Sequence[Candidate], n_windows: int) -> Part:
        """The next windows of each candidate: first those it was never evaluated on, if lazy, then those with the
        leader's largest excess: both separate candidates soonest."""
        excess = self._excess()
        part: dict[int, dict[Candidate, float]] = {}
        for candidate in candidates:
            earlier, limit = self._earlier(candidate), self._limit(candidate)
            left = [w for w in range(self.n_windows) if w not in self.done[candidate]]
            for window in sorted(left, key=lambda w: (earlier[w] > 0, -excess[w]))[:n_windows]:
                part.setdefault(window, {})[candidate] = limit
        return part

    def _excess(self) -> Sequence[float]:
        """The leader's divergence on each window in excess of its lower bound. All zero in racing, whose test assumes a
        random sample, so the results must not choose the windows."""
        if self.leader is None or self.mode == "racing":
            return (0.0,) * self.n_windows
        earlier = self._earlier(self.leader)
        return [self._sum(self.leader, [window]) - earlier[window] for window in range(self.n_windows)]

    def _alive(self) -> list[Candidate]:
        """Incomplete candidates that may still be the least, by depth."""
        return [
            c
            for c, done in self.done.items()
            if len(done) < self.n_windows
            and c not in self.dropped
            and self._whole(c)
            and not self._bound(c) > self.best
        ]

    def _foremost(self) -> Candidate | None:
        """The candidate in front among those begun and alive."""
        return min((c for c in self._alive() if self.done[c]), key=self._lead, default=None)

    def _front(self) -> Candidate | None:
        """The foremost candidate, if it is ahead of the leader: its total is likely to rule out many others."""
        front = self._foremost()
        if front is None or (self.leader is not None and self._lead(front) >= 0):
            return None
        if self.mode == "racing" and len(self.done[front]) < FRONT_SHARE * self.n_windows:
            return None
        return front

    def _lead(self, candidate: Candidate) -> float:
        """A candidate's sum minus the leader's, on the windows that the candidate has seen."""
        leaders = 0.0 if self.leader is None else self._sum(self.leader, self.done[candidate])
        return self._sum(candidate) - leaders

    def _limit(self, candidate: Candidate) -> float:
        """Exact: the most that a candidate may add on its next windows before it is abandoned. Lazy finishes a window
        that it began: the head costs less than the sublayers before it, and later steps get a better bound."""
        if self.mode != "exact" or self.best == math.inf:
            return math.inf
        # A little more than that: rounding must not stop a candidate with exactly the same total.
        return self.best * (1 + 1e-12) - self._bound(candidate)

    def _sum(self, candidate: Candidate, windows: Iterable[int] | None = None) -> float:
        """Sum over the windows seen, or over some of them; exactly rounded, so independent of their order."""
        done = self.done[candidate]
        return math.fsum(x for w in (done if windows is None else windows) for x in done[w])

    def _bound(self, candidate: Candidate) -> float:
        """A candidate's sum so far, with its earlier values for the windows not yet seen."""
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
        """Differences between the two, on each segment that both have seen."""
        return [
            ours - theirs
            for window in self.done[candidate].keys() & self.done[other].keys()
            for ours, theirs in zip(self.done[candidate][window], self.done[other][window], strict=True)
        ]

    def _behind(self, candidate: Candidate, other: Candidate) -> bool:
        # The probability is divided among all tests that could drop one candidate: against any other, after any part.
        n_parts = sum(1 for _ in part_sizes(self.n_windows, 1, RACING_GROWTH))
        n_tests = len(self.done) * (2 * n_parts + 1)
        n_all = self.n_windows * self.n_segments
        return behind(self._differences(candidate, other), n_all, self.error_probability / n_tests)

    def _estimate(self, candidate: Candidate) -> float:
        differences = self._differences(candidate, self.leader)
        return self.best + math.fsum(differences) / len(differences) * self.n_windows * self.n_segments


def part_sizes(n_windows: int, first: int, growth: float) -> Iterator[int]:
    """Windows of each part, until `n_windows` are done: at least `first`, or `growth` times those done before.

    From 1, with a growth of 1: 1, 1, 2, 4, 8, ...; of 0.5: 1, 1, 1, 2, 3, 4, 6, 9, ...
    """
    done = 0
    while done < n_windows:
        size = max(first, math.ceil(growth * done))
        yield size
        done += size


def behind(differences: Sequence[float], n_all: int, error_probability: float) -> bool:
    """One-sided paired t-test that the sum of `n_all` differences is above zero, from some of them.

    Assumes that those seen are a random sample of all, without replacement, and that their mean is normally
    distributed.

    Args:
        error_probability: of a true result although the sum is zero or less.
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
    """P(T > t) of Student's t with so many degrees of freedom."""
    from scipy.special import stdtr  # racing alone needs it

    return float(stdtr(degrees, -t))
