"""Improves a selection by exchanging removals at random, in EvoPress's manner: (1 + lambda), on ever more windows.

Each generation makes offspring of the parent: a few removals are put back, and others that fit the budget take their
place. All are evaluated on a few windows, the best of them on more, the last ones on all. The best takes the parent's
place if it is better there. Source: EvoPress, arXiv 2410.14649. The result is not nested.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from finercut.selection.bench import Bench
from finercut.selection.goal import Goal
from finercut.selection.race import Segments
from finercut.selection.selection import TOLERANCE
from finercut.selection.trajectory import Line
from finercut.sublayers import Candidate, parse

# Of the calibration windows, in the rounds of a generation; and of the offspring, how many go on to the next.
STAGES = (1 / 8, 1 / 2, 1)
KEPT = 1 / 4
# Random exchanges until one keeps within the budget and saves no less than the start.
TRIES = 100


class Generation(Line):
    """One generation: what the best of the offspring exchanged, if it is better than its parent."""

    put_back: list[str]
    """Empty, as `taken` is, where the parent stays."""
    taken: list[str]
    n_offspring: int
    """That differ from each other."""
    divergence: float
    """Of the selection after this generation, on the calibration tokens, per token."""
    held_out_divergence: float


def at_random(goal: Goal) -> list[Candidate]:
    """A selection of the budget, by `search.seed`."""
    return _filled(goal, [], set(), random.Random(f"{goal.settings.seed} start"))


def mutated(
    goal: Goal, parent: Sequence[Candidate], least: float, n_most: int, chance: random.Random
) -> list[Candidate] | None:
    """Put back up to `n_most` removals, few more often than many, and remove others in random order while they fit.

    Args:
        parent: the removals, whose order is kept.
        least: what the mutated selection has to save of the budget's unit.

    Returns:
        None where none that saves enough was found.
    """
    for _ in range(TRIES):
        n = min(chance.randint(1, n_most), chance.randint(1, n_most), len(parent))
        out = set(chance.sample(list(parent), n))
        stay = [candidate for candidate in parent if candidate not in out]
        child = _filled(goal, stay, out, chance)
        if goal.saved(child) >= least * (1 - TOLERANCE):
            return child
    return None


def _filled(goal: Goal, order: list[Candidate], but: set[Candidate], chance: random.Random) -> list[Candidate]:
    """With candidates other than `but` removed too, in random order, until none that saves anything fits the budget."""
    useful = {c for c in goal.left([]) if goal.saved([c]) > 0}
    while choice := [c for c in goal.left(order) if c not in but and c in useful and goal.allows(order, c)]:
        order = [*order, chance.choice(choice)]
    return order


def evolve(
    bench: Bench,
    goal: Goal,
    start: Sequence[Candidate],
    earlier: Sequence[Generation] = (),
    progress: Callable[[], Any] = lambda: None,
) -> Iterator[Generation]:
    """Generations of `search.evolution`, as decided by `search.seed`.

    The best of the offspring takes its parent's place if the divergence on the calibration tokens falls and the one on
    the held-out tokens does not rise.

    Args:
        bench: of the whole model less `start` as `after` the `earlier` generations leaves it; is changed likewise.
        earlier: generations of the same search made before; goes on after them.
    """
    settings = goal.settings.evolution
    least = goal.least(start)
    parent = after(start, earlier)
    now = (bench.divergence_now(), bench.held_out_divergence())
    for generation in range(len(earlier), settings.generations):
        chance = random.Random(f"{goal.settings.seed} {generation}")
        drawn = [mutated(goal, parent, least, settings.most_exchanged, chance) for _ in range(settings.offspring)]
        children = {_change(parent, child): child for child in drawn if child is not None}
        children.pop(Candidate(()), None)  # a block in place of its two sublayers
        windows = list(bench.deciding)
        chance.shuffle(windows)
        best = _best(bench, list(children), windows, now[0] * bench.n_tokens_deciding, progress)
        taken = parent
        if best is not None:
            before = bench.state()
            bench.change(best.sublayers)
            found = (bench.divergence_now(), bench.held_out_divergence())
            if found[0] < now[0] and found[1] <= now[1]:
                taken, now = children[best], found
            else:
                bench.return_to(before)
        yield Generation(
            put_back=[str(c) for c in parent if c not in taken],
            taken=[str(c) for c in taken if c not in parent],
            n_offspring=len(children),
            divergence=now[0],
            held_out_divergence=now[1],
        )
        parent = taken


def after(order: Sequence[Candidate], generations: Iterable[Generation]) -> list[Candidate]:
    """The removals once these generations are made: what stays in its order, and then what was taken."""
    order = list(order)
    for generation in generations:
        back = set(map(parse, generation.put_back))
        order = [candidate for candidate in order if candidate not in back] + list(map(parse, generation.taken))
    return order


def _change(parent: Iterable[Candidate], child: Iterable[Candidate]) -> Candidate:
    """Sublayers that one of the two selections removes and the other does not: a branch from the parent's trunk."""
    ours, theirs = ({s for candidate in each for s in candidate.sublayers} for each in (parent, child))
    return Candidate(tuple(sorted(ours ^ theirs)))


def _best(
    bench: Bench, children: Sequence[Candidate], windows: Sequence[int], limit: float, progress: Callable[[], Any]
) -> Candidate | None:
    """The child with the least divergence among those that come to the last stage, if it is less than `limit`: a sum
    over all calibration tokens. What goes over it is given up at once, for divergences only grow from window to window.
    """
    sums: dict[Candidate, list[Segments]] = {child: [] for child in sorted(children)}
    n_done = 0
    for share in STAGES:
        n = max(n_done, math.ceil(share * len(windows)))
        part = {
            w: {child: limit - math.fsum(x for row in done for x in row) for child, done in sums.items()}
            for w in windows[n_done:n]
        }
        if sums and part:
            for row in bench.totals(part).values():
                for child, segments in row.items():
                    sums[child].append(segments)
            progress()
        totals = {child: math.fsum(x for row in done for x in row) for child, done in sums.items()}
        n_kept = len(totals) if share == 1 else max(1, math.ceil(KEPT * len(totals)))
        kept = sorted((c for c in totals if totals[c] < limit), key=lambda c: (totals[c], c))[:n_kept]
        sums = {child: sums[child] for child in sorted(kept)}
        n_done = n
    return kept[0] if kept else None
