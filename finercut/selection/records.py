"""What is recorded of a search."""

from __future__ import annotations

from pydantic import Field

from finercut.system.records import Record


class Controls(Record):
    """Of a model on held-out tokens. Continuations are greedy; None where none were written."""

    agreement: float
    """Share of the held-out tokens after which its most likely next token is the whole model's."""
    repetition: float | None = None
    """Share of the continuations' 4-grams that were in the same continuation before; mean over the continuations."""
    missing_ends: float | None = None
    """Share of the continuations without an end-of-sequence token. None also where the model has no such token."""
    whole_repetition: float | None = None
    """The whole model's, for comparison."""
    whole_missing_ends: float | None = None


class Refitted(Record):
    """What the model measures with its kept projections refitted."""

    divergence: float
    """On the calibration tokens."""
    held_out_divergence: float


class SearchReport(Record):
    method: str = "greedy"
    """With what else decides: greedy_per_parameters_swaps, greedy_refitted."""
    nested: bool = True
    """The first removals are a selection too, for a smaller budget."""
    n_swaps: int = 0
    """Removals that were put back and replaced by another."""
    mode: str
    """exact, lazy or racing."""
    least_margin: float | None
    """Lazy and racing: the least by which a candidate that was not evaluated to the end, nor shown to be worse, was
    taken to be worse than the one removed; nats per token. null where every removal is exact."""
    largest_fall: float
    """The most by which a candidate's divergence fell from one step to a later one: lazy takes it never to."""
    error_probability: float
    """Racing: the chance, at most, that some test dropped the right candidate; summed over the steps."""
    divergence: str
    """js, kl, ..."""
    n_candidates: int
    n_removals: int
    removals: list[str]
    final_divergence: float
    """On the calibration tokens after the last removal."""
    final_held_out_divergence: float
    final_held_out_by_source: dict[str, float] = Field({})
    """Empty where there is one source."""
    final_refitted: Refitted | None = None
    """With `search.refit`: of the model that the search refitted; `final_divergence` and what is beside it are those of
    the pruned model with the whole model's weights, which `prune` writes."""
    curves_part: bool
    """Held-out divergence, on the worst source, is more than 1.5 times the calibration's: the search fits its
    calibration set."""
    controls: Controls | None = None
    """After the last removal."""
    stopped: str | None = None
    """Which limit of `search.stop` the next removal passes; None where none ended the search."""
    task_file_sha256: str | None = None
    """Of the examples' file, where they decide."""
    n_generations: int = 0
    """Of the evolutionary search."""
    evaluations: int
    """Candidates evaluated, to the end or until given up, over all greedy steps. 0, as are the two below, for methods
    without steps."""
    sublayer_passes: int
    """(sublayer, calibration window) forwards done."""
    brute_force_sublayer_passes: int
    """What full forwards of every candidate would have taken."""
    resumed_after: int
    """Removals that an earlier, interrupted search had made."""
    seconds: float
    """Wall time of this execution's removals."""
