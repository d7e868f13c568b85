"""Evaluates candidates as branches of one pass through the depth.

Removing a sublayer at depth d leaves the residual stream before d unchanged. So the current model runs once, with its
stream kept at every depth (the trunk), and a candidate is a branch that starts from the trunk at its own sublayer and
skips it. All live branches, of all windows, advance one sublayer at a time.

A candidate's result on a window depends in its last bits on the candidates beside it in a micro-batch, but on a CPU
never on other windows: another process may compute those. A GPU, which takes as long to start a matrix product as to
compute a small one, runs the branches of several windows at once.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finercut.model.workers import Workers
from finercut.selection.blocks import Blocks, Unit
from finercut.selection.divergence import Divergence, Reference
from finercut.selection.race import Part, Segments, Totals
from finercut.sublayers import Candidate, Sublayer

# Tokens whose divergences are one number for the race.
SEGMENT_TOKENS = 16


@dataclass(frozen=True)
class MicroBatch:
    """How much is computed at once."""

    tokens: int
    """Through a sublayer."""
    logits: int
    """By the head: of some tokens of several models. A candidate can be abandoned between two such batches."""
    divergence_logits: int
    """In float32, with as many for each intermediate result."""


# Of a CPU: as many as keep a core at its peak, few enough for every core to have some.
CPU_TOKENS = 512
CPU_HEAD_TOKENS = 128
# What the caches of a core hold: 1 MiB in float32.
CPU_DIVERGENCE_LOGITS = 2**18
# Tokens beyond which a GPU gains nothing.
GPU_TOKENS = 2**15


def micro_batch(
    blocks: Blocks, n_windows: int, n_tokens: int, wanted: int | None = None, free_bytes: int | None = None
) -> MicroBatch:
    """The sizes that fit: on a GPU, into the memory left beside the trunk, the branches and the references.

    Args:
        wanted: tokens through a sublayer at once, whatever fits.
        free_bytes: of the GPU; None asks the device.
    """
    device = blocks.model.device
    vocabulary = blocks.vocabulary
    if wanted is not None:
        return MicroBatch(wanted, wanted * vocabulary, wanted * vocabulary)
    if free_bytes is None:
        if device.type != "cuda":
            return MicroBatch(CPU_TOKENS, CPU_HEAD_TOKENS * vocabulary, CPU_DIVERGENCE_LOGITS)
        free_bytes, _ = torch.cuda.mem_get_info(device)
    element_bytes = blocks.model.dtype.itemsize
    # The trunk has a state for every sublayer and window, so have the branches.
    states = 4 * len(blocks.modules) * blocks.width * element_bytes
    left = max(0, free_bytes - n_windows * n_tokens * (states + 4 * vocabulary))
    return _within(left, vocabulary, (8 * blocks.width + 4 * blocks.widest) * element_bytes)


def _within(n_bytes: int, vocabulary: int, bytes_per_token: int) -> MicroBatch:
    """The largest powers of two that fit: the next run, with a little less memory free, mostly gets the same ones."""
    logits = max(_power_of_two(n_bytes // 3 // (4 * 6)), SEGMENT_TOKENS * vocabulary)
    tokens = min(GPU_TOKENS, _power_of_two(n_bytes // 3 // bytes_per_token))
    return MicroBatch(tokens=tokens, logits=logits, divergence_logits=logits)


def _power_of_two(n: int) -> int:
    """The largest that is not above n; 0 for 0."""
    return 1 << n.bit_length() >> 1


class Sweep:
    """The windows of a search, with the whole model's output on them and the trunk of the current model."""

    def __init__(
        self,
        blocks: Blocks,
        tokens: Tensor,
        divergence: Divergence,
        workers: Workers,
        micro_batch: MicroBatch,
        removed: Iterable[Sublayer] = (),
    ) -> None:
        """
        Args:
            tokens: ids, (windows, tokens), on the model's device.
            removed: sublayers already removed, when a search is resumed.

        Raises:
            ValueError: the whole model's logits are not finite.
        """
        self.blocks = blocks
        self.workers = workers
        self.divergence = divergence
        self.micro_batch = micro_batch
        self.n_windows, self.n_tokens = tokens.shape
        self.n_segments = -(-self.n_tokens // SEGMENT_TOKENS)
        self.vocabulary = blocks.vocabulary
        self.removed: frozenset[Sublayer] = frozenset()
        self._start = {s: depth for depth, unit in enumerate(blocks.units) for s in unit.sublayers}
        with torch.inference_mode():
            embedded = torch.cat(workers.map(lambda window: blocks.embed(window[None]), tokens))
            self.trunk = [embedded] * (len(blocks.units) + 1)
            """The stream before every unit, and after the last: (windows, tokens, hidden) each."""
            self._whole: list[Tensor] | None = None
            self._along: list[Tensor] = []
            """Of a divergence along the depth: the current model's at every depth of the trunk, (windows, tokens)."""
            self._run_trunk(0)
            of_whole = workers.map(self._of_whole, self.trunk[-1])
            self.references: list[Reference] = [reference for reference, _ in of_whole]
            self._most_likely = [ids for _, ids in of_whole]
            if divergence.along_depth:
                self._whole = list(self.trunk)
                self._along = [tokens.new_zeros(tokens.shape, dtype=torch.float64)] * len(self.trunk)
        if removed:
            self.remove(removed)

    @torch.inference_mode()
    def remove(self, sublayers: Iterable[Sublayer]) -> None:
        """Remove sublayers permanently: later candidates are evaluated on top of that."""
        new = frozenset(sublayers)
        self.removed |= new
        self._run_trunk(min(self._start[s] for s in new))

    @torch.inference_mode()
    def rerun(self) -> None:
        """Run the current model again, whose weights have changed."""
        self._run_trunk(0)

    @property
    def sublayers(self) -> frozenset[Sublayer]:
        """Those not removed."""
        return self._start.keys() - self.removed

    def passes(self, candidate: Candidate) -> int:
        """Number of sublayers that the branch without `candidate` runs through on one window."""
        gone = self.removed.symmetric_difference(candidate.sublayers)
        return sum(s not in gone for unit in self.blocks.units[self._depth(candidate) :] for s in unit.sublayers)

    def divergences(self, windows: Sequence[int]) -> list[float]:
        """The current model's divergence on each of the windows, summed over its tokens."""
        return [divergence for divergence, _ in self.compared(windows)]

    @torch.inference_mode()
    def compared(self, windows: Sequence[int]) -> list[tuple[float, int]]:
        """The current model on each of the windows: its divergence, summed over the tokens; and after how many of them
        its most likely next token is the whole model's."""
        return self.workers.map(self._compared, windows)

    @torch.inference_mode()
    def totals(self, part: Part) -> Totals:
        """Divergence of the model without each candidate, on each of its windows. Uses each sublayer's weights once.

        A sum stops once it exceeds its limit. The divergence of a non-finite output is infinite.
        """
        ends = self._ends({window: list(row) for window, row in part.items()})
        together = max(1, self.micro_batch.logits // (SEGMENT_TOKENS * self.vocabulary))
        jobs = []
        for window, row in part.items():
            limits = iter(row.values())
            jobs += [
                (window, states, list(itertools.islice(limits, len(states))))
                for states in _evenly(ends[window], together)
            ]
        found = self.workers.map(lambda job: self._segments(*job), jobs)
        segments = itertools.chain.from_iterable(found)
        return {window: {candidate: next(segments) for candidate in row} for window, row in part.items()}

    def _run_trunk(self, first: int) -> None:
        for depth in range(first, len(self.blocks.units)):
            states = self.trunk[depth].clone()
            self._advance(self.blocks.units[depth], ((window, self.removed) for window in states.split(1)))
            self.trunk[depth + 1] = states
            if self._whole is not None:
                self._along[depth + 1] = self._along[depth] + self._distance(states, self._whole[depth + 1])

    def _ends(self, branches: dict[int, list[Candidate]]) -> dict[int, Tensor]:
        """Final states of the model without each candidate; or, along the depth, its divergence at each token.

        Args:
            branches: candidates of each window, by depth. What is in one that is removed already comes back.

        Returns:
            for each window, (candidates, tokens, hidden); or (candidates, tokens)
        """
        shape = self.trunk[0].shape[1:]
        states = {window: self.trunk[0].new_empty(len(row), *shape) for window, row in branches.items()}
        along: dict[int, Tensor] = {}
        if self._whole is not None:
            along = {window: self._along[0].new_empty(len(row), self.n_tokens) for window, row in branches.items()}
        starts = {window: [self._depth(c) for c in row] for window, row in branches.items()}
        together = max(1, self.micro_batch.tokens // self.n_tokens)
        for depth in range(min(row[0] for row in starts.values()), len(self.blocks.units)):
            unit = self.blocks.units[depth]
            batches: list[tuple[Tensor, frozenset[Sublayer]]] = []
            for window, row in branches.items():
                first_new, n_live = bisect_left(starts[window], depth), bisect_right(starts[window], depth)
                states[window][first_new:n_live] = self.trunk[depth][window]
                # Together, those that agree with the trunk at this unit; a block is a candidate of two units.
                first_plain = 0
                for i in range(n_live):
                    if not set(unit.sublayers).isdisjoint(row[i].sublayers):
                        batches += self._plain(states[window][first_plain:i], together)
                        changed = self.removed.symmetric_difference(row[i].sublayers)
                        batches.append((states[window][i : i + 1], changed))
                        first_plain = i + 1
                batches += self._plain(states[window][first_plain:n_live], together)
            self._advance(unit, batches)
            if self._whole is not None:
                self._go_along(depth, starts, states, along)
        return states if self._whole is None else along

    def _plain(self, states: Tensor, together: int) -> list[tuple[Tensor, frozenset[Sublayer]]]:
        return [(batch, self.removed) for batch in _evenly(states, together)]

    def _go_along(
        self, depth: int, starts: dict[int, list[int]], states: dict[int, Tensor], along: dict[int, Tensor]
    ) -> None:
        """Add to each branch's divergence along the depth what the unit at `depth` brings."""

        def add(window: int) -> None:
            first_new, n_live = bisect_left(starts[window], depth), bisect_right(starts[window], depth)
            along[window][first_new:n_live] = self._along[depth][window]
            along[window][:n_live] += self._distance(states[window][:n_live], self._whole[depth + 1][window])

        self.workers.map(add, states)

    def _distance(self, states: Tensor, whole: Tensor) -> Tensor:
        """(..., tokens, hidden) -> (..., tokens): of the mean over units, one unit's part."""
        states, whole = self.blocks.stream(states), self.blocks.stream(whole).double()
        squared = (states.double() - whole).square().sum(-1)
        return squared / whole.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny) / len(self.blocks.units)

    def _advance(self, unit: Unit, batches: Iterable[tuple[Tensor, frozenset[Sublayer]]]) -> None:
        """Run (branches, tokens, hidden) states through a unit without its removed sublayers, in place."""

        def run(batch: tuple[Sequence[Tensor], frozenset[Sublayer]]) -> None:
            states, removed = batch
            together = states[0] if len(states) == 1 else torch.cat(states)
            after = self.blocks.run(unit, together, removed).split([len(part) for part in states])
            for part, new in zip(states, after, strict=True):
                part.copy_(new)

        # A sublayer that is gone changes nothing; a block that is run as one may have more than its sublayers.
        whole = not self.blocks.layout.sequential
        running = [b for b in batches if len(b[0]) and (whole or not b[1].issuperset(unit.sublayers))]
        self.workers.map(run, self._joined(running) if self._joins_windows else [((s,), r) for s, r in running])

    @property
    def _joins_windows(self) -> bool:
        return self.blocks.model.device.type == "cuda"

    def _joined(
        self, batches: Iterable[tuple[Tensor, frozenset[Sublayer]]]
    ) -> list[tuple[list[Tensor], frozenset[Sublayer]]]:
        """Those without the same sublayers together, as far as a micro-batch has room."""
        together = max(1, self.micro_batch.tokens // self.n_tokens)
        joined: dict[frozenset[Sublayer], list[list[Tensor]]] = {}
        for states, removed in batches:
            pieces = joined.setdefault(removed, [[]])
            if sum(map(len, pieces[-1])) + len(states) > together and pieces[-1]:
                pieces.append([])
            pieces[-1].append(states)
        return [(piece, removed) for removed, pieces in joined.items() for piece in pieces]

    def _depth(self, candidate: Candidate) -> int:
        return self._start[candidate.sublayers[0]]

    def _of_whole(self, states: Tensor) -> tuple[Reference, Tensor]:
        """The whole model's reference on a window and its most likely next tokens, from its final (tokens, hidden)
        states."""
        pieces: list[Reference] = []
        most_likely: list[Tensor] = []
        for part in states.split(self._head_tokens(1)):
            logits = self.blocks.logits(part[None])[0].float()
            if not logits.isfinite().all():
                raise ValueError("the whole model's logits are not finite on the calibration tokens; try float32")
            pieces.append(self.divergence.reference(logits))
            most_likely.append(logits.argmax(-1))
        return tuple(map(torch.cat, zip(*pieces, strict=True))), torch.cat(most_likely)

    def _compared(self, window: int) -> tuple[float, int]:
        states = self.trunk[-1][window][None]
        segments: list[float] = []
        n_agreeing = 0
        for start in range(0, self.n_tokens, self._head_tokens(1)):
            part = slice(start, start + self._head_tokens(1))
            logits = self.blocks.logits(states[:, part])
            n_agreeing += int((logits[0].argmax(-1) == self._most_likely[window][part]).sum())
            if self._whole is None:
                (sums,) = self._segment_sums(window, part, logits)
                segments += sums
        if self._whole is not None:
            (segments,) = _sums(self._along[-1][window][None])
        return math.fsum(map(_or_infinite, segments)), n_agreeing

    def _head_tokens(self, n_models: int) -> int:
        """Tokens of each of `n_models` models in one batch of the head: whole segments."""
        return max(1, self.micro_batch.logits // (self.vocabulary * n_models * SEGMENT_TOKENS)) * SEGMENT_TOKENS

    def _segments(self, window: int, states: Tensor, limits: Sequence[float]) -> list[Segments]:
        """Divergence of models on a window, summed over each segment, from their final (models, tokens, hidden) states.

        The head runs on some tokens at a time, and only for models that have not exceeded their limit: the fewer
        models, the more tokens of each. Along the depth, `states` are the values at each token, (models, tokens).
        """
        if self._whole is not None:
            return [tuple(map(_or_infinite, sums)) for sums in _sums(states)]
        segments: list[Segments] = [()] * len(states)
        under_way = list(range(len(states)))
        start = 0
        while under_way and start < self.n_tokens:
            part = slice(start, start + self._head_tokens(len(under_way)))
            sums = self._segment_sums(window, part, self.blocks.logits(states[under_way, part]))
            for model, new in zip(under_way, sums, strict=True):
                segments[model] += tuple(map(_or_infinite, new))
            under_way = [model for model in under_way if not math.fsum(segments[model]) > limits[model]]
            start = part.stop
        return segments

    def _segment_sums(self, window: int, tokens: slice, logits: Tensor) -> list[list[float]]:
        reference = tuple(kept[tokens] for kept in self.references[window])
        n_tokens = max(1, self.micro_batch.divergence_logits // (self.vocabulary * len(logits)))
        values = [
            self.divergence.per_token(whole, pruned.float())
            for *whole, pruned in zip(
                *(kept.split(n_tokens) for kept in reference),
                logits.split(n_tokens, dim=1),
                strict=True,
            )
        ]
        return _sums(torch.cat(values, dim=-1))


def _sums(values: Tensor) -> list[list[float]]:
    """(models, tokens) -> for each model, over each segment."""
    segments = values.double().split(SEGMENT_TOKENS, dim=-1)
    return torch.stack([segment.sum(-1) for segment in segments], dim=-1).tolist()


def _or_infinite(x: float) -> float:
    return x if x == x else math.inf


def _evenly(states: Tensor, together: int) -> Sequence[Tensor]:
    """As few pieces of at most `together` as possible, nearly equal: parallel ones end at about the same time."""
    return states.tensor_split(-(-len(states) // together)) if len(states) else ()
