"""How far a search goes: to a number of removals, or as far as a budget needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finercut.model.costs import Cost, Costs
from finercut.selection.selection import allowance, could_go_on, fits, left_over, whole_number
from finercut.selection.settings import Budget, Search
from finercut.sublayers import candidates, open_candidates, parse, protected


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
        return len(candidates(self.n_blocks, self.settings.candidates))

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
        return len(open_candidates(pool, [], protected(self.settings.protect, self.n_blocks)))

    def check(self) -> None:
        """
        Raises:
            ValueError: more is to be removed than there is, or less than any candidate.
        """
        n, settings, budget = self.n_removals, self.settings, self.budget
        if n is not None:
            if not 0 < n <= self.n_candidates:
                raise ValueError(
                    f"search.removals = {settings.removals}: cannot remove {n} of {self.n_candidates} candidates"
                )
            return
        cost, allowed = allowance(budget, self.costs)
        pool = left_over(self.n_blocks, settings.candidates, settings.protect, [])
        amounts = [cost.of(candidate.sublayers) for candidate in pool]
        asked = f"prune.budget = {budget.amount} {budget.unit}"
        which = f"of search.candidates = {settings.candidates} that search.protect leaves"
        if not any(amount > 0 and fits(amount, allowed) for amount in amounts):
            raise ValueError(f"{asked} is less than any single candidate {which}: raise the budget")
        # One attention stays, whatever the budget.
        attending = [cost.of(c.sublayers) for c in pool if any(s.kind == "attention" for s in c.sublayers)]
        most = sum(amounts) - (min(attending) if len(attending) == self.n_blocks else 0)
        if most < allowed:
            share = most / cost.whole
            raise ValueError(f"{asked} is more than all candidates {which}, {share:.3g}: lower the budget")

    def end(self, removals: Sequence[str]) -> int | None:
        """How many of these removals, by name, the goal needs; None: the search has to go on.

        With a budget, the last one needed is the first that the budget does not allow.
        """
        if self.n_removals is not None:
            return self.n_removals if len(removals) >= self.n_removals else None
        cost, allowed = allowance(self.budget, self.costs)
        spent = 0.0
        for n, name in enumerate(removals):
            if not self._could_go_on(cost, allowed, spent, removals[:n]):
                return n
            spent += cost.of(parse(name).sublayers)
            if not fits(spent, allowed):
                return n + 1
        return None if self._could_go_on(cost, allowed, spent, removals) else len(removals)

    def _could_go_on(self, cost: Cost, allowed: float, spent: float, removals: Sequence[str]) -> bool:
        left = left_over(self.n_blocks, self.settings.candidates, self.settings.protect, removals)
        return could_go_on(cost, allowed, spent, left)

    def estimate(self, removals: Sequence[str]) -> int:
        """How many removals there will be in all, if the next ones cost what these did on average."""
        if self.n_removals is not None:
            return self.n_removals
        cost, allowed = allowance(self.budget, self.costs)
        spent = cost.of(s for name in removals for s in parse(name).sublayers)
        return min(self.n_most, math.ceil(len(removals) * allowed / spent)) if spent else self.n_most
