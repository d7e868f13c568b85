"""Greedy search: always removes the candidate whose absence changes the model's output least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finercut.model.families import layout_of
from finercut.selection.blocks import Blocks
from finercut.selection.distributed import ALONE, Ranks, SharedSweep
from finercut.selection.divergence import DIVERGENCES
from finercut.selection.race import MODES, Race
from finercut.selection.sweep import SEGMENT_TOKENS, micro_batch
from finercut.selection.trajectory import Removal
from finercut.selection.workers import Workers
from finercut.sublayers import Candidate, FrontExclusion, Sublayer, candidates, open_candidates, parse, protected


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
    earlier: Iterable[Removal] = (),
    mode: str = "exact",
    error_probability: float = 0.05,
    first_windows: int = 1,
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
        divergence: js, kl, angular, norm or js_official.
        kinds: attention, mlp, both or blocks.
        protect: names of sublayers and blocks that stay.
        exclude: the authors' rule for the front blocks, see `FrontExclusion`; None for none.
        earlier: removals of the same search made before; it continues after them.
        mode: what candidates are given up for before they are evaluated to the end, see `Race`: exact, lazy, racing;
            or brute, for nothing.
        error_probability: racing: the chance, at most, that a step's removal is not what lazy would have found.
        first_windows: of the calibration set, in a step's first part; those after it grow from there. Fewer save work,
            more save passes.
        micro_batch_tokens: tokens that go through a sublayer at once; None for what fits.
        ranks: the processes that share the windows; each is given all of both sets, and yields the same removals.
        progress: called after every part of the calibration set.

    Raises:
        ValueError: more is to be removed than there is, no candidate's output is finite, the two sets' windows are of
            different lengths, there is no such mode, or there are more processes than calibration windows.
    """
    layout = layout_of(model.config)
    n_blocks = len(model.get_submodule(layout.blocks))
    pool = candidates(n_blocks, kinds)
    kept = protected(protect, n_blocks)
    exclusion = None if exclude is None else FrontExclusion(len(pool), exclude)
    n_open = len(open_candidates(pool, [], kept))
    if n_removals > n_open:
        raise ValueError(f"cannot remove {n_removals} of {n_open} candidates ({len(pool) - n_open} are protected)")
    if mode not in MODES:
        raise ValueError(f"a search's mode is {', '.join(MODES[:-1])} or {MODES[-1]}, not {mode!r}")
    if calibration.shape[1] != held_out.shape[1]:
        raise ValueError(
            f"calibration windows have {calibration.shape[1]} tokens, held-out windows {held_out.shape[1]}; "
            "give both the same length"
        )
    if len(calibration) < ranks.size:
        raise ValueError(f"{len(calibration)} calibration windows cannot be shared by {ranks.size} processes")

    earlier = list(earlier)
    gone = [parse(removal.sublayer) for removal in earlier]
    lost = [s for candidate in gone for s in candidate.sublayers]
    tokens = torch.cat([calibration, held_out]).to(model.device)
    deciding, unseen = range(len(calibration)), range(len(calibration), len(tokens))
    with torch.inference_mode():
        blocks = Blocks(model, layout, tokens[:1])
    sizes = ranks.least(micro_batch(blocks, *tokens.shape, micro_batch_tokens))
    with Workers(model.device) as workers:
        sweep = SharedSweep(ranks, blocks, tokens, DIVERGENCES[divergence], workers, sizes, lost)
        known = {parse(name): totals for removal in earlier for name, totals in removal.by_window.items()}

        for step in range(len(gone) + 1, n_removals + 1):
            possible = open_candidates(pool, gone, kept, exclusion)
            choice = [c for c in possible if _leaves_an_attention(c, gone, n_blocks)]
            if not choice:
                raise ValueError(f"nothing may be removed after {step - 1} removals: the rest is protected or excluded")
            race = Race(choice, len(deciding), sweep.n_segments, mode, known, error_probability, first_windows)
            n_passes = 0
            for part in race.parts():
                race.record(sweep.totals(part))
                n_passes += sum(sweep.passes(c) for row in part.values() for c in row)
                progress()
            best = _least(race.outcome().values, step)
            n_sublayers = len(sweep.sublayers)
            sweep.remove(best.sublayers)
            gone.append(best)
            known |= race.now_known()
            yield _removal(
                step,
                best,
                race,
                calibration.numel(),
                held_out_divergence=sum(sweep.divergences(unseen)) / held_out.numel(),
                head_tokens=race.segments * SEGMENT_TOKENS,
                sublayer_passes=n_passes,
                brute_force_sublayer_passes=len(calibration) * sum(n_sublayers - len(c.sublayers) for c in choice),
            )


def _least(values: Mapping[Candidate, float], step: int) -> Candidate:
    best = min(values, key=lambda c: (values[c], c), default=None)
    if best is None or values[best] == math.inf:
        raise ValueError(f"no candidate's output is finite after {step - 1} removals; try float32")
    return best


def _removal(step: int, best: Candidate, race: Race, n_tokens: int, **counted: Any) -> Removal:
    outcome = race.outcome()

    def means(totals: Mapping[Candidate, float]) -> dict[str, float]:
        return {str(c): total / n_tokens for c, total in totals.items()}

    judged = means(outcome.stale | outcome.dropped)
    divergence = outcome.values[best] / n_tokens
    return Removal(
        step=step,
        sublayer=str(best),
        divergence=divergence,
        mode=race.mode,
        values=means(outcome.values),
        abandoned=means(outcome.abandoned),
        stale=means(outcome.stale),
        dropped=means(outcome.dropped),
        margin=min(judged.values()) - divergence if judged else None,
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
