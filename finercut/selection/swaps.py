"""Improves a selection: puts one removed candidate back and removes another in its place, while that helps.

Greedy search never takes a removal back, though a later one may have made it a bad one. The result is not nested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from finercut.selection.bench import Bench
from finercut.selection.race import Race
from finercut.selection.trajectory import Line
from finercut.sublayers import Candidate, parse

Replacements = Callable[[Sequence[Candidate], Candidate], Sequence[Candidate]]


class Trial(Line):
    """One removed candidate, put back."""

    put_back: str
    taken: str | None
    """What is removed in its place; None where nothing lowers both divergences."""
    divergence: float
    """Of the selection after this trial, on the calibration tokens, per token."""
    held_out_divergence: float


def swap(
    bench: Bench,
    order: Sequence[Candidate],
    n_rounds: int,
    replacements: Replacements,
    earlier: Sequence[Trial] = (),
    progress: Callable[[], Any] = lambda: None,
) -> Iterator[Trial]:
    """Try to replace each removal, in their order, in each round; ends early after a round that replaced none.

    A replacement counts if the divergence on the calibration tokens falls and the one on the held-out tokens does not
    rise. Candidates are given up as soon as they come to more than the present divergence.

    Args:
        bench: of the whole model less `order` as `after` the `earlier` trials leaves it; is changed likewise.
        replacements: what may be removed in place of a candidate, given the others that are gone.
        earlier: trials of the same swaps made before; goes on after them.
    """
    order = after(order, earlier)
    done = list(earlier)
    now = (bench.divergence_now(), bench.held_out_divergence())
    while order and len(done) < n_rounds * len(order):
        n_before, position = divmod(len(done), len(order))
        if position == 0 and n_before > 0 and not any(trial.taken for trial in done[-len(order) :]):
            return
        out = order[position]
        others = order[:position] + order[position + 1 :]
        before = bench.state()
        bench.restore(out.sublayers)
        best = _least(bench, replacements(others, out), now[0] * bench.n_tokens_deciding, progress)
        taken = None
        if best is not None:
            bench.remove(best.sublayers)
            found = (bench.divergence_now(), bench.held_out_divergence())
            if found[0] < now[0] and found[1] <= now[1]:
                taken, now, order[position] = best, found, best
        if taken is None:
            bench.return_to(before)
        done.append(
            Trial(
                put_back=str(out),
                taken=None if taken is None else str(taken),
                divergence=now[0],
                held_out_divergence=now[1],
            )
        )
        yield done[-1]


def after(order: Sequence[Candidate], trials: Iterable[Trial]) -> list[Candidate]:
    """The removals once these trials are made; what was taken stands where what was put back did."""
    order = list(order)
    for trial in trials:
        if trial.taken is not None:
            order[order.index(parse(trial.put_back))] = parse(trial.taken)
    return order


def _least(bench: Bench, choice: Sequence[Candidate], limit: float, progress: Callable[[], Any]) -> Candidate | None:
    """The candidate that comes to least, if that is less than `limit`: a sum over all calibration tokens."""
    if not choice:
        return None
    race = Race(choice, len(bench.deciding), bench.n_segments)
    race.best = limit
    for part in race.parts():
        race.record(bench.totals(part))
        progress()
    values = {c: total for c, total in race.outcome().values.items() if total < limit}
    return min(values, key=lambda c: (values[c], c), default=None)
