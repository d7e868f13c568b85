"""A selection: which sublayers go. Every method of choosing hands one to `prune`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, model_validator

from finercut.model.costs import Cost, Costs
from finercut.selection.settings import Budget
from finercut.sublayers import Candidate, Sublayer, candidates, parse, protected
from finercut.system.records import Record

# Amounts are compared with this relative tolerance: 0.29 of 100 is 29, and not 28.
TOLERANCE = 1e-9


class Origin(Record):
    """The model and the tokens that a selection was made on."""

    model_source: str
    model_revision: str
    model_sha256: str
    n_blocks: Annotated[int, Field(ge=1, le=10_000)]
    calibration_sha256: str
    held_out_sha256: str
    divergence: str
    """js, kl, ..."""


class Chosen(Record):
    """One removal of a selection."""

    candidate: str
    """12.attention, 12.mlp or 12.block."""
    divergence: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Of the model after this removal and those before it, on the calibration tokens; None where nobody measured."""
    held_out_divergence: float | None = None


class Selection(Record):
    """The sublayers to remove, by whichever method."""

    method: str
    """search.method, with what else decides (greedy_per_parameters_swaps); `given` for a list that a user wrote."""
    nested: bool
    """The removals are in order, and the first k of them are a selection too, for every k."""
    removals: list[Chosen]
    left: list[str]
    """Candidates that the method could have removed next. Empty where it went to its end."""
    origin: Origin | None = None
    """None where the method knows of none."""

    @model_validator(mode="after")
    def _each_sublayer_once(self) -> Selection:
        seen: set[Sublayer] = set()
        for chosen in self.removals:
            sublayers = parse(chosen.candidate).sublayers
            if not seen.isdisjoint(sublayers):
                raise ValueError(f"{chosen.candidate} is removed twice")
            seen.update(sublayers)
        return self

    @property
    def sublayers(self) -> list[Sublayer]:
        """In the order of removal."""
        return [s for chosen in self.removals for s in parse(chosen.candidate).sublayers]

    def first(self, n_removals: int) -> Selection:
        """
        Raises:
            ValueError: the selection is not nested, and `n_removals` are not all of it.
        """
        if n_removals == len(self.removals):
            return self
        if not self.nested:
            raise ValueError(
                f"the {self.method} selection of {len(self.removals)} removals cannot be cut to {n_removals}: "
                "it is not nested; select again for this budget"
            )
        left = [c.candidate for c in self.removals[n_removals:]] + self.left
        return self.model_copy(update={"removals": self.removals[:n_removals], "left": left})

    def within(self, budget: Budget, costs: Costs) -> Selection:
        """The most removals, from the first, that stay within a budget.

        Raises:
            ValueError: there is no such cost; the budget is smaller than the first removal; or it is larger than the
                selection goes, which another removal could have reached.
        """
        cost, allowed = allowance(budget, costs)
        spent = 0.0
        for n_removals, chosen in enumerate(self.removals):
            sublayers = parse(chosen.candidate).sublayers
            if unknown := [str(s) for s in sublayers if s not in cost.by_sublayer]:
                raise ValueError(f"cannot remove {', '.join(unknown)}: the model has no such sublayer")
            spent += cost.of(sublayers)
            if not fits(spent, allowed):
                if n_removals == 0:
                    raise ValueError(
                        f"the first removal, {chosen.candidate}, is already over {budget.amount} {budget.unit}"
                    )
                return self.first(n_removals)
        if could_go_on(cost, allowed, spent, map(parse, self.left)):
            raise ValueError(
                f"the selection ends after {len(self.removals)} removals, at {spent / cost.whole:.3g} of the model's "
                f"{budget.unit}; prune.budget allows {allowed / cost.whole:.3g}: set search.removals to auto, or higher"
            )
        return self


def given(removals: Iterable[Sublayer | str]) -> Selection:
    """A selection from sublayers or names that the caller chose, in their order."""
    return Selection(method="given", nested=True, removals=[Chosen(candidate=str(r)) for r in removals], left=[])


def allowance(budget: Budget, costs: Costs) -> tuple[Cost, float]:
    """The cost a budget is counted in, and how much of it may go, in that cost's unit.

    Raises:
        ValueError: there is no such cost, or the budget is the whole model.
    """
    if budget.unit not in costs:
        raise ValueError(f"no cost {budget.unit!r} for a budget; there are {', '.join(costs)}")
    cost = costs[budget.unit]
    if budget.unit != "sublayers":
        return cost, budget.amount * cost.whole
    allowed = whole_number(budget.amount, int(cost.whole))
    if allowed >= cost.whole:
        raise ValueError(f"cannot remove {budget.amount} of {cost.whole:g} sublayers")
    return cost, allowed


def whole_number(amount: float, of: int) -> int:
    """`amount` itself, if it is a number; rounded down, if it is a share of `of`."""
    return int(amount) if amount >= 1 else int(amount * of * (1 + TOLERANCE) + TOLERANCE)


def fits(spent: float, allowed: float) -> bool:
    return spent <= allowed * (1 + TOLERANCE)


def could_go_on(cost: Cost, allowed: float, spent: float, left: Iterable[Candidate]) -> bool:
    """Whether a removal of one of `left` costs something and stays within the budget."""
    amounts = (cost.of(candidate.sublayers) for candidate in left)
    return any(amount > 0 and fits(spent + amount, allowed) for amount in amounts)


def left_over(n_blocks: int, kinds: str, protect: Iterable[str], gone: Iterable[str]) -> list[Candidate]:
    """Candidates of a search over `kinds` that may still go after `gone`. The last attention may not."""
    lost = {s for name in gone for s in parse(name).sublayers}
    attentions = {Sublayer(i, "attention") for i in range(n_blocks)} - lost
    kept = protected(protect, n_blocks)
    return [
        candidate
        for candidate in candidates(n_blocks, kinds)
        if lost.isdisjoint(candidate.sublayers)
        and kept.isdisjoint(candidate.sublayers)
        and attentions - set(candidate.sublayers)
    ]
