"""Measures a model with sublayers removed, on the calibration and on the held-out tokens. Every method uses it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finercut.model.families import layout_of
from finercut.model.workers import Workers
from finercut.selection.blocks import Blocks
from finercut.selection.controls import Continuations
from finercut.selection.distributed import ALONE, Ranks, SharedSweep
from finercut.selection.divergence import OBJECTIVES, perplexity, task
from finercut.selection.race import Part, Totals
from finercut.selection.records import Controls
from finercut.selection.sweep import micro_batch
from finercut.selection.trajectory import Step
from finercut.sublayers import Candidate, Sublayer
from finercut.tokens import by_source, source_weights


class Bench(SharedSweep):
    """The sweep over all windows of a selection: the calibration windows first, then the held-out ones.

    At the end of the block, its threads are gone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Tensor,
        held_out: Tensor,
        objective: str = "js",
        *,
        calibration_sources: Sequence[str] = (),
        held_out_sources: Sequence[str] = (),
        targets: tuple[Tensor, Tensor] | None = None,
        continuations: Continuations | None = None,
        micro_batch_tokens: int | None = None,
        ranks: Ranks = ALONE,
        removed: Iterable[Sublayer] = (),
    ) -> None:
        """
        Args:
            calibration_sources, held_out_sources: which source each window is from: divergences are means over sources.
                Empty where all are from one.
            objective: a name in OBJECTIVES. perplexity is the negative log-likelihood of each next token, 0 for the
                last token of a window; task, of the `targets`.
            targets: of task, for each set: the id that each token is to predict, -1 where it does not count.
            continuations: what `controls` writes; None for nothing.
            removed: sublayers that are gone from the start.

        Raises:
            ValueError: the two sets' windows are of different lengths, there are more processes than calibration
                windows, or the whole model's logits are not finite.
        """
        if calibration.shape[1] != held_out.shape[1]:
            raise ValueError(
                f"calibration windows have {calibration.shape[1]} tokens, held-out windows {held_out.shape[1]}; "
                "give both the same length"
            )
        if len(calibration) < ranks.size:
            raise ValueError(f"{len(calibration)} calibration windows cannot be shared by {ranks.size} processes")
        self.calibration, self.held_out = calibration, held_out
        self.held_out_sources = held_out_sources
        self.weights = [
            *source_weights(calibration_sources or ("",) * len(calibration)),
            *source_weights(held_out_sources or ("",) * len(held_out)),
        ]
        """Of each window in a sum over windows."""
        tokens = torch.cat([calibration, held_out]).to(model.device)
        self.deciding, self.unseen = range(len(calibration)), range(len(calibration), len(tokens))
        with torch.inference_mode():
            blocks = Blocks(model, layout_of(model.config), tokens[:1])
        sizes = ranks.least(micro_batch(blocks, *tokens.shape, micro_batch_tokens))
        divergence = OBJECTIVES[objective]
        with ExitStack() as stack:
            workers = stack.enter_context(Workers(model.device))
            super().__init__(ranks, blocks, tokens, divergence, workers, sizes, removed)
            self._threads = stack.pop_all()
        self.n_tokens_deciding, self.n_tokens_unseen = calibration.numel(), held_out.numel()
        if divergence in (perplexity, task):
            ids = torch.cat(targets).to(model.device) if divergence is task else _next_tokens(tokens)
            self.references = [(window,) for window in ids[ranks.rank :: ranks.size]]
        if divergence is task:
            self.n_tokens_deciding, self.n_tokens_unseen = (int((part >= 0).sum()) for part in targets)
            # No token is -1: where nothing is to be predicted, nothing agrees.
            counts = (ids[ranks.rank :: ranks.size] >= 0).unbind()
            self._most_likely = [torch.where(c, m, -1) for c, m in zip(counts, self._most_likely, strict=True)]
        self._continuations = continuations

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    def divergences(self, windows: Sequence[int]) -> list[float]:
        """Of the model as it stands, summed over the tokens of each window, by its weight."""
        found = super().divergences(windows)
        return [self.weights[window] * value for window, value in zip(windows, found, strict=True)]

    def totals(self, part: Part) -> Totals:
        """As of `Sweep`, by the weight of each window; the limits are too."""
        limits = {w: {c: limit / self.weights[w] for c, limit in row.items()} for w, row in part.items()}
        return {
            w: {c: tuple(self.weights[w] * x for x in segments) for c, segments in row.items()}
            for w, row in super().totals(limits).items()
        }

    def held_out_divergence(self) -> float:
        """Of the model as it stands, per token, a mean over sources."""
        return self.held_out_divergences()[0]

    def held_out_divergences(self) -> tuple[float, dict[str, float]]:
        """The same, and for each source; for none where there is one."""
        return self._means([divergence for divergence, _ in self.compared(self.unseen)])

    def held_out_controls(self) -> tuple[float, dict[str, float], Controls]:
        """The held-out divergences of the model as it stands, and its controls."""
        found = self.compared(self.unseen)
        agreement = sum(n_agreeing for _, n_agreeing in found) / self.n_tokens_unseen
        written = {}
        if self._continuations is not None:
            written = self._continuations.of(self.blocks.model, self.removed, self.workers, self.ranks)
        return *self._means([divergence for divergence, _ in found]), Controls(agreement=agreement, **written)

    def _means(self, values: Sequence[float]) -> tuple[float, dict[str, float]]:
        """Per token, of what held-out windows come to: over all sources, and for each."""
        weighted = [self.weights[window] * value for window, value in zip(self.unseen, values, strict=True)]
        sources = self.held_out_sources if len(set(self.held_out_sources)) > 1 else ()
        per_token = by_source([value / self.n_tokens for value in values], sources)
        means = {source: math.fsum(of_source) / len(of_source) for source, of_source in per_token.items()}
        return sum(weighted) / self.n_tokens_unseen, means

    def divergence_now(self) -> float:
        """Of the model as it stands, on the calibration tokens, per token."""
        return math.fsum(self.divergences(self.deciding)) / self.n_tokens_deciding

    def restore(self, sublayers: Iterable[Sublayer]) -> None:
        """Put removed sublayers back."""
        back = frozenset(sublayers)
        if back:
            self.removed -= back
            with torch.inference_mode():
                self._run_trunk(min(self._start[s] for s in back))

    def state(self) -> tuple[frozenset[Sublayer], list[Tensor], list[Tensor]]:
        """What `return_to` takes. Depths that do not change afterwards take no memory twice."""
        return self.removed, list(self.trunk), list(self._along)

    def return_to(self, state: tuple[frozenset[Sublayer], list[Tensor], list[Tensor]]) -> None:
        self.removed, self.trunk, self._along = state[0], list(state[1]), list(state[2])

    @torch.inference_mode()
    def change(self, sublayers: Iterable[Sublayer]) -> None:
        """Remove those that are there, and put those back that are not."""
        changed = frozenset(sublayers)
        self.removed ^= changed
        self._run_trunk(min(self._start[s] for s in changed))

    @torch.inference_mode()
    def mean(self, value: Callable[[int], float]) -> float:
        """Over the calibration windows, of all processes; a mean over sources.

        Args:
            value: of a window, by its index in this process's trunk.
        """
        mine = [
            self.weights[w] * value(w // self.ranks.size)
            for w in self.deciding
            if w % self.ranks.size == self.ranks.rank
        ]
        return math.fsum(x for share in self.ranks.gather(mine) for x in share) / len(self.deciding)

    def before(self, sublayer: Sublayer, window: int) -> Tensor:
        """(tokens, hidden) stream before a sublayer of the model as it stands."""
        return self.blocks.stream(self._before(sublayer, window))

    def _before(self, sublayer: Sublayer, window: int) -> Tensor:
        return self.trunk[self._start[sublayer]][window]

    def after(self, candidate: Candidate, window: int) -> Tensor:
        """(tokens, hidden) stream to which nothing but what is in `candidate` was added since before it."""
        unit = self.blocks.units[self._start[candidate.sublayers[-1]]]
        others = set(unit.sublayers) - set(candidate.sublayers)
        if not others:
            return self.blocks.stream(self.trunk[self._start[candidate.sublayers[-1]] + 1][window])
        before = self._before(candidate.sublayers[0], window)
        return self.blocks.stream(self.blocks.run(unit, before[None], self.removed | others)[0])


def measured(bench: Bench, order: Iterable[Candidate]) -> Iterator[Step]:
    """Remove candidates in their order, for good, and measure the model after each removal."""
    for step, candidate in enumerate(order, start=1):
        bench.remove(candidate.sublayers)
        held_out_divergence, by_source, controls = bench.held_out_controls()
        if not math.isfinite(held_out_divergence):
            raise ValueError(
                f"the model's output is not finite after {step} removals, the last of them {candidate}: try float32"
            )
        yield Step(
            step=step,
            sublayer=str(candidate),
            divergence=bench.divergence_now(),
            held_out_divergence=held_out_divergence,
            held_out_by_source=by_source,
            controls=controls,
        )


def _next_tokens(windows: Tensor) -> Tensor:
    """The id that each token is to predict; -1 for the last of a window."""
    return torch.cat([windows[:, 1:], torch.full_like(windows[:, :1], -1)], dim=1)
