"""Greedy search: always removes the candidate whose absence changes the model's output least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from finercut.model.costs import Cost
from finercut.model.families import fixed_sublayers, layout_of
from finercut.selection.bench import Bench
from finercut.selection.controls import Continuations
from finercut.selection.distributed import ALONE, Ranks
from finercut.selection.per_cost import PerCost, carried_over
from finercut.selection.race import MODES, Known, Race
from finercut.selection.repair import Repair
from finercut.selection.sweep import SEGMENT_TOKENS
from finercut.selection.trajectory import Removal
from finercut.sublayers import (
    Candidate,
    FrontExclusion,
    Sublayer,
    candidates,
    most_removals,
    open_candidates,
    parse,
    protected,
)


def search(
    model: PreTrainedModel,
    calibration: Tensor,
    held_out: Tensor,
    n_removals: int,
    *,
    divergence: str = "js",
    kinds: str = "both",
    protect: Iterable[str] = (),
    exclude: float | None = None,
    per: Cost | None = None,
    allows: Callable[[Sequence[Candidate], Candidate], bool] | None = None,
    targets: tuple[Tensor, Tensor] | None = None,
    continuations: Continuations | None = None,
    repair: Repair | None = None,
    earlier: Iterable[Removal] = (),
    mode: str = "exact",
    error_probability: float = 0.05,
    first_windows: int = 1,
    calibration_sources: Sequence[str] = (),
    held_out_sources: Sequence[str] = (),
    micro_batch_tokens: int | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[], Any] = lambda: None,
) -> Iterator[Removal]:
    """Greedy search, yielding each removal as soon as it is decided.

    Every candidate is judged on top of the removals before it, against the whole model. Equal candidates: the
    shallower goes first. The last attention always stays. A candidate whose output is not finite is never removed.

    Args:
        model: the whole model, in evaluation mode, in the dtype and on the device to search in; not changed.
        calibration: token ids, (samples, tokens): what decides.
        held_out: token ids, (samples, tokens): only measured, after each removal.
        n_removals: how many candidates to remove in all, `earlier` included.
        divergence: js, kl, angular, norm, js_official or trajectory; or perplexity or task, see `Bench`, which fall
            with some removals, so that lazy and racing are wrong.
        kinds: attention, mlp, both, blocks or any.
        protect: names of sublayers and blocks that stay.
        exclude: the authors' rule for the front blocks, see `FrontExclusion`; None for none.
        per: remove the candidate that raises the divergence least per unit of this cost, see `PerCost`. None may cost
            nothing.
        allows: whether a candidate may go after those that are gone; all may by default.
        targets: of the divergence task, see `Bench`.
        continuations: what is written after each removal for its controls; None for nothing.
        repair: refits the model between removals, exact mode only. The model has the whole one's weights again when the
            iterator is closed.
        earlier: removals of the same search made before; it continues after them.
        mode: what candidates are given up for before they are evaluated to the end, see `Race`: exact, lazy, racing;
            or brute, for nothing.
        error_probability: racing: the chance, at most, that a step's removal is not what lazy would have found.
        first_windows: of the calibration set, in a step's first part; those after it grow from there. Fewer save work,
            more save passes.
        calibration_sources, held_out_sources: which source each window is from: divergences are means over sources.
            Empty where all are from one.
        micro_batch_tokens: tokens that go through a sublayer at once; None for what fits.
        ranks: the processes that share the windows; each is given all of both sets, and yields the same removals.
        progress: called after every part of the calibration set.

    Raises:
        ValueError: more is to be removed than there is, no candidate's output is finite, the two sets' windows are of
            different lengths, there is no such mode, there are more processes than calibration windows, or `per` does
            not go with the mode or with a candidate.
    """
    n_blocks = len(layout_of(model.config).holders(model))
    pool = candidates(n_blocks, kinds)
    kept = protected(protect, n_blocks) | fixed_sublayers(model.config).keys()
    exclusion = None if exclude is None else FrontExclusion(len(pool), exclude)
    n_open = most_removals(open_candidates(pool, [], kept))
    if n_removals > n_open:
        n_protected = most_removals(pool) - n_open
        raise ValueError(f"cannot remove {n_removals} of {n_open} candidates ({n_protected} are protected)")
    if mode not in MODES:
        raise ValueError(f"a search's mode is {', '.join(MODES[:-1])} or {MODES[-1]}, not {mode!r}")
    if per is not None and mode == "racing":
        raise ValueError("mode racing cannot weigh divergences against costs: with per, it is exact or lazy")
    if per is not None and (free := [str(c) for c in open_candidates(pool, [], kept) if not per.of(c.sublayers) > 0]):
        raise ValueError(f"removing {free[0]} saves no {per.unit}: there is no divergence per unit of it")

    earlier = list(earlier)
    gone = [parse(removal.sublayer) for removal in earlier]
    lost = [s for candidate in gone for s in candidate.sublayers]
    given = {"targets": targets, "continuations": continuations, "micro_batch_tokens": micro_batch_tokens}
    sources = {"calibration_sources": calibration_sources, "held_out_sources": held_out_sources}
    with ExitStack() as stack:
        bench = stack.enter_context(
            Bench(model, calibration, held_out, divergence, removed=lost, ranks=ranks, **given, **sources)
        )
        if repair is not None:
            stack.callback(repair.undo)
            if earlier:
                repair.apply(bench, gone, earlier[-1].divergence)
        known: Known = {}
        now = [0.0] * len(calibration)  # the divergence on each window
        for removal in earlier:
            totals = {parse(name): totals for name, totals in removal.by_window.items()}
            known, now = _known_after(parse(removal.sublayer), dict(known) | totals, now, per)

        for step in range(len(gone) + 1, n_removals + 1):
            choice = [
                c
                for c in open_candidates(pool, gone, kept, exclusion)
                if _leaves_an_attention(c, gone, n_blocks) and (allows is None or allows(gone, c))
            ]
            if not choice:
                raise ValueError(f"nothing may be removed after {step - 1} removals: the rest is protected or excluded")
            race = _race(bench, choice, mode, known, error_probability, first_windows, per)
            n_passes = 0
            for part in race.parts():
                race.record(bench.totals(part))
                n_passes += sum(bench.passes(c) for row in part.values() for c in row)
                progress()
            best = _least(race, step)
            n_sublayers = len(bench.sublayers)
            if repair is not None:
                repair.undo()
            bench.remove(best.sublayers)
            gone.append(best)
            known, now = _known_after(best, dict(known) | race.now_known(), now, per)
            measured: dict[str, Any] = {}
            if repair is not None:
                bench.rerun()
                measured["divergence"] = bench.divergence_now()
            held_out_divergence, held_out_by_source, controls = bench.held_out_controls()
            if repair is not None:
                measured["refitted"] = repair.apply(bench, gone, measured["divergence"])
            yield _removal(
                step,
                best,
                race,
                bench.n_tokens_deciding,
                measured,
                held_out_divergence=held_out_divergence,
                held_out_by_source=held_out_by_source,
                controls=controls,
                head_tokens=race.segments * SEGMENT_TOKENS,
                sublayer_passes=n_passes,
                brute_force_sublayer_passes=len(calibration) * sum(n_sublayers - len(c.sublayers) for c in choice),
            )


def _known_after(
    removed: Candidate, known: Known, now: Sequence[float], per: Cost | None
) -> tuple[Known, Sequence[float]]:
    """What the next step knows of the candidates, and the divergence on each window, after a removal."""
    after = known[removed]
    return (known if per is None else carried_over(known, removed, now, after)), after


def _race(
    bench: Bench,
    choice: Sequence[Candidate],
    mode: str,
    known: Known,
    error_probability: float,
    first_windows: int,
    per: Cost | None,
) -> Race:
    step = (choice, len(bench.deciding), bench.n_segments, mode, known, error_probability, first_windows)
    if per is None:
        return Race(*step)
    costs = {c: per.share(c.sublayers) for c in choice}
    return PerCost(*step, base=bench.divergences(bench.deciding), cost=costs)


def _least(race: Race, step: int) -> Candidate:
    values = race.outcome().values
    if isinstance(race, PerCost):
        values = {c: race.ratio(c, total) for c, total in values.items()}
    best = min(values, key=lambda c: (values[c], c), default=None)
    if best is None or values[best] == math.inf:
        raise ValueError(f"no candidate's output is finite after {step - 1} removals; try float32")
    return best


def _removal(
    step: int, best: Candidate, race: Race, n_tokens: int, measured: Mapping[str, Any], **counted: Any
) -> Removal:
    outcome = race.outcome()

    def means(totals: Mapping[Candidate, float]) -> dict[str, float]:
        return {str(c): total / n_tokens for c, total in totals.items()}

    divergence = outcome.values[best] / n_tokens
    if isinstance(race, PerCost):
        margin = race.margin()
        margin = None if margin is None else margin / n_tokens
    else:
        judged = means(outcome.stale | outcome.dropped)
        margin = min(judged.values()) - divergence if judged else None
    return Removal(
        step=step,
        sublayer=str(best),
        **{"divergence": divergence} | measured,
        mode=race.mode,
        values=means(outcome.values),
        abandoned=means(outcome.abandoned),
        stale=means(outcome.stale),
        dropped=means(outcome.dropped),
        margin=margin,
        largest_fall=outcome.largest_fall / n_tokens,
        error_probability=race.error_probability if outcome.dropped else 0.0,
        by_window={str(c): totals for c, totals in race.now_known().items() if race.done[c]},
        evaluations=race.evaluations,
        **counted,
    )


def _leaves_an_attention(candidate: Candidate, gone: Iterable[Candidate], n_blocks: int) -> bool:
    # Without any attention there is no KV cache to count positions by, and no model to speak of.
    without = {s for c in (*gone, candidate) for s in c.sublayers}
    return any(Sublayer(i, "attention") not in without for i in range(n_blocks))
