"""The search: always remove the candidate whose absence changes the model's output least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from finercut.divergence import DIVERGENCES
from finercut.families import layout_of
from finercut.sublayers import Candidate, FrontExclusion, Sublayer, candidates, open_candidates, parse, protected
from finercut.sweep import Sweep
from finercut.trajectory import Removal


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
        progress: called after every calibration window.

    Raises:
        ValueError: more is to be removed than there is, or no candidate's output is finite.
    """
    layout = layout_of(model.config)
    n_blocks = len(model.get_submodule(layout.blocks))
    pool = candidates(n_blocks, kinds)
    kept = protected(protect, n_blocks)
    exclusion = None if exclude is None else FrontExclusion(len(pool), exclude)
    n_open = len(open_candidates(pool, [], kept))
    if n_removals > n_open:
        raise ValueError(f"cannot remove {n_removals} of {n_open} candidates ({len(pool) - n_open} are protected)")

    earlier = list(earlier)
    gone = [parse(removal.sublayer) for removal in earlier]
    lost = [s for candidate in gone for s in candidate.sublayers]
    sweep = Sweep(model, layout, calibration, DIVERGENCES[divergence], lost)
    unseen = Sweep(model, layout, held_out, DIVERGENCES[divergence], lost)

    for step in range(len(gone) + 1, n_removals + 1):
        choice = [c for c in open_candidates(pool, gone, kept, exclusion) if _leaves_an_attention(c, gone, n_blocks)]
        if not choice:
            raise ValueError(f"nothing may be removed after {step - 1} removals: the rest is protected or excluded")
        outcome = sweep.evaluate(choice, abandon=abandon, progress=progress)
        best = min(outcome.values, key=lambda c: (outcome.values[c], c), default=None)
        if best is None or outcome.values[best] == float("inf"):
            raise ValueError(f"no candidate's output is finite after {step - 1} removals; try float32")
        n_sublayers = sweep.n_sublayers
        sweep.remove(best.sublayers)
        unseen.remove(best.sublayers)
        gone.append(best)
        yield Removal(
            step=step,
            sublayer=str(best),
            divergence=outcome.values[best],
            held_out_divergence=unseen.divergence(),
            values={str(c): value for c, value in outcome.values.items()},
            abandoned={str(c): value for c, value in outcome.abandoned.items()},
            evaluations=len(choice),
            sublayer_passes=outcome.sublayer_passes,
            brute_force_sublayer_passes=len(calibration) * sum(n_sublayers - len(c.sublayers) for c in choice),
        )


def _leaves_an_attention(candidate: Candidate, gone: Iterable[Candidate], n_blocks: int) -> bool:
    # Without any attention there is no KV cache to count positions by, and no model to speak of.
    without = {s for c in (*gone, candidate) for s in c.sublayers}
    return any(Sublayer(i, "attention") not in without for i in range(n_blocks))
