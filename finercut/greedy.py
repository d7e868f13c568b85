"""The search: always remove the candidate whose absence changes the model's output least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finercut.blocks import Blocks
from finercut.distributed import ALONE, Ranks, SharedSweep
from finercut.divergence import DIVERGENCES
from finercut.families import layout_of
from finercut.race import Race
from finercut.sublayers import Candidate, FrontExclusion, Sublayer, candidates, open_candidates, parse, protected
from finercut.sweep import micro_batch
from finercut.trajectory import Removal
from finercut.workers import Workers


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
    abandon: bool = True,
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
        abandon: give candidates up once they cannot be the least. The removals are the same either way.
        ranks: the processes that share the windows; each is given all of both sets, and yields the same removals.
        progress: called after every part of the calibration set.

    Raises:
        ValueError: more is to be removed than there is, no candidate's output is finite, the two sets' windows are of
            different lengths, or there are more processes than calibration windows.
    """
    layout = layout_of(model.config)
    n_blocks = len(model.get_submodule(layout.blocks))
    pool = candidates(n_blocks, kinds)
    kept = protected(protect, n_blocks)
    exclusion = None if exclude is None else FrontExclusion(len(pool), exclude)
    n_open = len(open_candidates(pool, [], kept))
    if n_removals > n_open:
        raise ValueError(f"cannot remove {n_removals} of {n_open} candidates ({len(pool) - n_open} are protected)")

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
    sizes = ranks.least(micro_batch(model.config, model.device, *tokens.shape))
    sweep = SharedSweep(ranks, blocks, tokens, DIVERGENCES[divergence], Workers(model.device), sizes, lost)

    for step in range(len(gone) + 1, n_removals + 1):
        choice = [c for c in open_candidates(pool, gone, kept, exclusion) if _leaves_an_attention(c, gone, n_blocks)]
        if not choice:
            raise ValueError(f"nothing may be removed after {step - 1} removals: the rest is protected or excluded")
        race = Race(choice, len(deciding), sweep.n_segments, abandon)
        n_passes = 0
        for part in race.parts():
            race.record(sweep.totals(part))
            n_passes += sum(sweep.passes(c) for row in part.values() for c in row)
            progress()
        outcome = race.outcome()
        best = min(outcome.values, key=lambda c: (outcome.values[c], c), default=None)
        if best is None or outcome.values[best] == float("inf"):
            raise ValueError(f"no candidate's output is finite after {step - 1} removals; try float32")
        n_sublayers = sum(map(len, (unit.kinds for unit in blocks.units))) - len(sweep.removed)
        sweep.remove(best.sublayers)
        gone.append(best)
        yield Removal(
            step=step,
            sublayer=str(best),
            divergence=outcome.values[best] / calibration.numel(),
            held_out_divergence=sum(sweep.divergences(unseen)) / held_out.numel(),
            values={str(c): value / calibration.numel() for c, value in outcome.values.items()},
            abandoned={str(c): value / calibration.numel() for c, value in outcome.abandoned.items()},
            evaluations=len(choice),
            sublayer_passes=n_passes,
            brute_force_sublayer_passes=len(calibration) * sum(n_sublayers - len(c.sublayers) for c in choice),
        )


def _leaves_an_attention(candidate: Candidate, gone: Iterable[Candidate], n_blocks: int) -> bool:
    # Without any attention there is no KV cache to count positions by, and no model to speak of.
    without = {s for c in (*gone, candidate) for s in c.sublayers}
    return any(Sublayer(i, "attention") not in without for i in range(n_blocks))
