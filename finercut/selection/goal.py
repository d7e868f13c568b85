"""How far a search goes: to a number of removals, or as far as a budget needs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finercut.model.costs import Cost, Costs
from finercut.selection.records import Controls
from finercut.selection.selection import allowance, comes_to, fits, left_over, whole_number
from finercut.selection.settings import TARGETS, Budget, Search
from finercut.sublayers import (
    Candidate,
    FrontExclusion,
    candidates,
    most_removals,
    open_candidates,
    parse,
    protected,
)


@dataclass(frozen=True)
class Goal:
    """What `search.removals` asks for."""

    settings: Search
    budget: Budget
    """Counts where `search.removals` is auto."""
    costs: Costs
    n_blocks: int

    @property
    def n_candidates(self) -> int:
        """Without those of which the blocks have nothing."""
        there = self.costs["sublayers"].by_sublayer
        pool = candidates(self.n_blocks, self.settings.candidates)
        return len([c for c in pool if any(there.get(sublayer) for sublayer in c.sublayers)])

    @property
    def n_removals(self) -> int | None:
        """None where the budget decides."""
        wanted = self.settings.removals
        return None if wanted == "auto" else whole_number(wanted, self.n_candidates)

    @property
    def n_most(self) -> int:
        """Removals that the search makes at most."""
        if self.n_removals is not None:
            return self.n_removals
        pool = candidates(self.n_blocks, self.settings.candidates)
        return most_removals(open_candidates(pool, [], protected(self.settings.protect, self.n_blocks)))

    @property
    def fills(self) -> bool:
        """Whether what the budget has no room for is passed over; a target always has."""
        return self.settings.fill and not self.budget.is_target

    @property
    def per(self) -> Cost | None:
        """Of `search.per`."""
        return None if self.settings.per is None else self.costs[self.settings.per]

    def costs_sha256(self, names: Iterable[str | None]) -> str | None:
        """Of those of these columns that depend on a load or were measured; None where there are none."""
        added = {name: self.costs[name] for name in names if name in TARGETS.values() and name in self.costs}
        return hashlib.sha256(repr(sorted(added.items())).encode()).hexdigest() if added else None

    def check(self) -> None:
        """
        Raises:
            ValueError: more is to be removed than there is, or less than any candidate; or a candidate costs nothing of
                `search.per`.
        """
        self._check_per()
        n, settings, budget = self.n_removals, self.settings, self.budget
        pool = self._reached(self._left([]))
        left_by = "search.protect" if settings.exclude is None else "search.protect and search.exclude"
        which = f"of search.candidates = {settings.candidates} that {left_by} leaves"
        # One attention stays, whatever the goal.
        attending = [c for c in pool if any(s.kind == "attention" for s in c.sublayers)]
        one_stays = most_removals(attending) == self.n_blocks
        if n is not None:
            possible = most_removals(pool) - one_stays
            if not 0 < n <= possible:
                raise ValueError(
                    f"search.removals = {settings.removals}: cannot remove {n} of {self.n_candidates} candidates; "
                    f"beside {left_by} and the one attention that stays, {possible} can go"
                )
            return
        allowed = allowance(budget, self.costs)
        cost = allowed.cost
        asked = f"prune.budget = {budget.amount} {budget.unit}"
        stays = min(cost.of(c.sublayers) for c in attending) if one_stays else 0
        most = cost.of({s for c in pool for s in c.sublayers}) - stays
        if budget.is_target:
            if not allowed.reached(most):
                raise ValueError(
                    f"{asked} cannot be reached: without all candidates {which}, the model comes to "
                    f"{comes_to(budget.unit, cost, most):.4g}"
                )
            return
        if most <= 0:
            raise ValueError(
                f"{asked}: no candidate {which} saves any of it: choose other search.candidates, or less of {left_by}"
            )
        if not allowed.could_go_on(0.0, pool):
            raise ValueError(f"{asked} is less than any single candidate {which}: raise the budget")
        if most < allowed.amount:
            share = most / cost.whole
            raise ValueError(f"{asked} is more than all candidates {which}, {share:.3g}: lower the budget")

    def end(self, removals: Sequence[str]) -> int | None:
        """How many of these removals, by name, the goal needs; None: the search has to go on.

        With a budget, the last one needed is the first that the budget does not allow; with a target, the first that
        reaches it.
        """
        if self.n_removals is not None:
            return self.n_removals if len(removals) >= self.n_removals else None
        allowed = allowance(self.budget, self.costs)
        spent = 0.0
        for n, name in enumerate(removals):
            if not allowed.could_go_on(spent, self._left(removals[:n])):
                return n
            amount = allowed.cost.of(parse(name).sublayers)
            if not allowed.allows(spent, amount):
                return n + 1
            spent += amount
        return None if allowed.could_go_on(spent, self._left(removals)) else len(removals)

    def passed(self, controls: Controls | None) -> str | None:
        """Which limit of `search.stop` a model passes, in words; None if it keeps to all."""
        stop = self.settings.stop
        if controls is None:
            return None
        if stop.agreement is not None and controls.agreement < stop.agreement:
            return f"agreement {controls.agreement:.3g} is below search.stop.agreement = {stop.agreement:g}"
        for name in ("repetition", "missing_ends"):
            limit, found, whole = getattr(stop, name), getattr(controls, name), getattr(controls, f"whole_{name}")
            if None not in (limit, found, whole) and found > limit:
                return f"{name} {found:.3g} is above search.stop.{name} = {limit:g} (the whole model's is {whole:.3g})"
        return None

    def allows(self, gone: Iterable[Candidate], candidate: Candidate) -> bool:
        """Whether the budget has room for `candidate` too: of a target, whether it is not reached without."""
        return allowance(self.budget, self.costs).allows(self.saved(gone), self.saved([candidate]))

    def take(self, order: Iterable[Candidate]) -> list[Candidate]:
        """The removals of an order, from its first, that the goal needs.

        What is protected, in part gone, or the last attention is passed over; with `search.fill`, so is what does not
        fit the budget any more.

        Raises:
            ValueError: the order ends before the goal is reached.
        """
        taken: list[Candidate] = []
        for candidate in order:
            if candidate in self.left(taken) and (not self.settings.fill or self.allows(taken, candidate)):
                taken.append(candidate)
                if self.end(list(map(str, taken))) is not None:
                    return taken
        raise ValueError(
            f"nothing may be removed after {len(taken)} removals: the rest is protected or the last attention"
        )

    def within(self, order: Sequence[Candidate]) -> list[Candidate]:
        """The first removals of an order, as long as the budget allows them."""
        n = next((n for n, candidate in enumerate(order) if not self.allows(order[:n], candidate)), len(order))
        return list(order[:n])

    def replacements(self, kept_out: Sequence[Candidate], out: Candidate) -> list[Candidate]:
        """What may go in place of `out`, beside `kept_out`: within the budget, and saving enough."""
        least = self.least([*kept_out, out]) - self.saved(kept_out)
        return [
            c for c in self.left(kept_out) if c != out and fits(least, self.saved([c])) and self.allows(kept_out, c)
        ]

    def saved(self, removals: Iterable[Candidate]) -> float:
        """Of the budget's cost."""
        return self.costs[self.budget.cost].of(s for c in removals for s in c.sublayers)

    def least(self, removals: Iterable[Candidate]) -> float:
        """What others in place of these have to save of the budget's cost: as much, or what reaches the target."""
        saved = self.saved(removals)
        return min(saved, allowance(self.budget, self.costs).amount) if self.budget.is_target else saved

    def left(self, removals: Iterable[Candidate]) -> list[Candidate]:
        """What may still go after these removals, within the budget or not."""
        return self._left(map(str, removals))

    def _left(self, removals: Iterable[str]) -> list[Candidate]:
        return left_over(self.n_blocks, self.settings.candidates, self.settings.protect, removals)

    def _reached(self, pool: Sequence[Candidate]) -> list[Candidate]:
        """Those of the candidates that come into reach: front blocks do after enough removals of others."""
        if self.settings.exclude is None:
            return list(pool)
        front = FrontExclusion(len(candidates(self.n_blocks, self.settings.candidates)), self.settings.exclude)
        behind = [c for c in pool if not front.covers(c, 0)]
        return list(pool) if most_removals(behind) >= front.until_removals else behind

    def _check_per(self) -> None:
        if self.settings.per is None:
            return
        if self.settings.per not in self.costs:
            raise ValueError(
                f"search.per = {self.settings.per}: no such cost; there are {', '.join(self.costs)}; run `finercut "
                "costs` for others"
            )
        if free := [str(c) for c in self._left([]) if not self.per.of(c.sublayers) > 0]:
            raise ValueError(
                f"search.per = {self.settings.per}: removing {free[0]} saves none of it; choose among others by "
                f"search.candidates, now {self.settings.candidates}"
            )

    def estimate(self, removals: Sequence[str]) -> int:
        """How many removals there will be in all, if the next ones cost what these did on average."""
        if self.n_removals is not None:
            return self.n_removals
        allowed, spent = allowance(self.budget, self.costs).amount, self.saved(map(parse, removals))
        return min(self.n_most, math.ceil(len(removals) * allowed / spent)) if spent else self.n_most
