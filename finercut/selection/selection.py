"""A selection: which sublayers go. Every method of choosing hands one to `prune`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from finercut.selection.settings import Budget, Unit
from finercut.sublayers import Candidate, Sublayer, candidates, parse, protected
from finercut.system.records import Record

if TYPE_CHECKING:
    from finercut.model.costs import Cost, Costs

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

    made_by = "search"

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
        """The most removals, from the first, that stay within a budget; the fewest that reach it, if it is a target.

        Raises:
            ValueError: there is no such cost; the budget is smaller than the first removal; or it is larger than the
                selection goes, which another removal could have reached.
        """
        allowed = allowance(budget, costs)
        cost, spent = allowed.cost, 0.0
        for n_removals, chosen in enumerate(self.removals):
            sublayers = parse(chosen.candidate).sublayers
            if unknown := [str(s) for s in sublayers if s not in cost.by_sublayer]:
                raise ValueError(f"cannot remove {', '.join(unknown)}: the model has no such sublayer")
            if not allowed.allows(spent, cost.of(sublayers)):
                if n_removals == 0:
                    raise ValueError(
                        f"the first removal, {chosen.candidate}, is already over {budget.amount} {budget.unit}"
                    )
                return self.first(n_removals)
            spent += cost.of(sublayers)
        if budget.is_target and not allowed.reached(spent):
            raise ValueError(
                f"the selection ends after {len(self.removals)} removals, at {budget.unit} "
                f"{comes_to(budget.unit, cost, spent):.4g}; prune.budget asks for {budget.amount:g}: set "
                "search.removals to auto, or higher, or ask for less"
            )
        if allowed.could_go_on(spent, map(parse, self.left)):
            raise ValueError(
                f"the selection ends after {len(self.removals)} removals, at {spent / cost.whole:.3g} of the model's "
                f"{budget.unit}; prune.budget allows {allowed.amount / cost.whole:.3g}: set search.removals to auto, "
                "or higher"
            )
        return self


def given(removals: Iterable[Sublayer | str]) -> Selection:
    """A selection from sublayers or names that the caller chose, in their order."""
    return Selection(method="given", nested=True, removals=[Chosen(candidate=str(r)) for r in removals], left=[])


@dataclass(frozen=True)
class Allowance:
    """What a budget comes to, in the unit of its cost."""

    cost: Cost
    amount: float
    """The most that may go; of a target, the least that has to."""
    is_target: bool

    def allows(self, spent: float, more: float) -> bool:
        """Whether removals that save `spent` may be followed by one that saves `more`."""
        return not self.reached(spent) if self.is_target else fits(spent + more, self.amount)

    def reached(self, spent: float) -> bool:
        return fits(self.amount, spent)

    def could_go_on(self, spent: float, left: Iterable[Candidate]) -> bool:
        """Whether one of `left` saves something and is allowed."""
        amounts = (self.cost.of(candidate.sublayers) for candidate in left)
        return any(amount > 0 and self.allows(spent, amount) for amount in amounts)


def allowance(budget: Budget, costs: Costs) -> Allowance:
    """
    Raises:
        ValueError: there is no such cost, or the model has nothing of it; or the budget is the whole model, or a target
            that the whole model reaches.
    """
    if budget.cost not in costs:
        raise ValueError(
            f"prune.budget in {budget.unit} needs the costs in {budget.cost}, and there are only {', '.join(costs)}: "
            "run `finercut costs`"
        )
    cost = costs[budget.cost]
    if not cost.whole:
        raise ValueError(f"prune.budget in {budget.unit}: this model has no {budget.cost} at all; take another unit")
    if budget.is_target:
        left = cost.whole / budget.amount if budget.unit == "speed_up" else budget.amount
        if left >= cost.whole:
            raise ValueError(
                f"prune.budget = {budget.amount:g} {budget.unit}: the whole model comes to {cost.whole:.4g} already; "
                "lower the amount"
            )
        return Allowance(cost, cost.whole - left, is_target=True)
    if budget.unit != "sublayers":
        return Allowance(cost, budget.amount * cost.whole, is_target=False)
    allowed = whole_number(budget.amount, int(cost.whole))
    if allowed >= cost.whole:
        raise ValueError(f"cannot remove {budget.amount} of {cost.whole:g} sublayers")
    return Allowance(cost, allowed, is_target=False)


def comes_to(unit: Unit, cost: Cost, spent: float) -> float:
    """What a model that saves `spent` of a cost comes to, in the unit of a target."""
    left = cost.whole - spent
    return cost.whole / left if unit == "speed_up" else left


def whole_number(amount: float, of: int) -> int:
    """`amount` itself, if it is a number; rounded down, if it is a share of `of`."""
    return int(amount) if amount >= 1 else int(amount * of * (1 + TOLERANCE) + TOLERANCE)


def fits(spent: float, allowed: float) -> bool:
    return spent <= allowed * (1 + TOLERANCE)


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
