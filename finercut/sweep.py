"""The model run sublayer by sublayer, with candidates as branches of the residual stream.

A candidate at depth d leaves the stream before d untouched. So the model as it stands is run once, its stream kept at
every depth (the trunk), and a candidate is a branch that starts from the trunk where its sublayer is and skips it. All
branches that are under way go through a sublayer as one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finercut.divergence import Divergence, Reference
from finercut.families import Layout
from finercut.modeling_finercut import bypass
from finercut.sublayers import KINDS, Candidate, Sublayer

# Tokens that go through a sublayer at once. Larger ones spill out of the caches of CPUs and win nothing.
MICRO_BATCH_TOKENS = 2048
# Logits whose divergence is computed at once: 4 MiB in float32, which the caches of a core hold.
DIVERGENCE_LOGITS = 2**20


@dataclass(frozen=True)
class Unit:
    """What is run as one: a sublayer, or a whole block where its sublayers read the same stream."""

    block: int
    kinds: tuple[str, ...]

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        return tuple(Sublayer(self.block, kind) for kind in self.kinds)


class Blocks:
    """The blocks of a model, any of whose sublayers can be left out of a forward."""

    def __init__(self, model: PreTrainedModel, layout: Layout, tokens: Tensor) -> None:
        """
        Args:
            tokens: ids, (1, tokens), of the length that will be run.
        """
        self.model = model
        self.layout = layout
        self.container = model.get_submodule(layout.blocks)
        self.blocks = list(self.container)
        self._views: dict[tuple[int, frozenset[str]], nn.Module] = {}
        self._arguments = self._capture(tokens)
        kinds = [(kind,) for kind in KINDS] if self._sequential(tokens) else [KINDS]
        self.units = [Unit(i, k) for i in range(len(self.blocks)) for k in kinds]

    def view(self, block: int, without: frozenset[str]) -> nn.Module:
        """The block with some kinds bypassed; shares its weights."""
        key = (block, without)
        if key not in self._views:
            view = copy.copy(self.blocks[block])
            view._modules = dict(view._modules)
            for kind in sorted(without):
                bypass(view, kind, self.layout.to_dict())
            self._views[key] = view
        return self._views[key]

    def run(self, unit: Unit, states: Tensor, removed: Iterable[Sublayer]) -> Tensor:
        """One unit on (batch, tokens, hidden) states; `removed` may name sublayers of other units too."""
        gone = frozenset(s.kind for s in removed if s.block == unit.block)
        if len(unit.kinds) == 1:
            if gone.issuperset(unit.kinds):
                return states
            gone = frozenset(KINDS) - set(unit.kinds)
        args, kwargs = self._arguments[unit.block]
        return self.view(unit.block, gone)(states, *args, **kwargs)

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) ids -> (batch, tokens, hidden): what the first block is given."""
        with self._replaced(_Catch()) as catch:
            self.model(tokens, use_cache=False)
        return catch.states

    def logits(self, states: Tensor) -> Tensor:
        """(batch, tokens, hidden) after the last block -> (batch, tokens, vocab), all by the model's own code."""
        with self._replaced(_Inject(states)):
            ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
            return self.model(ids, use_cache=False).logits

    @contextmanager
    def _replaced(self, only: nn.Module) -> Iterator[Any]:
        blocks = self.container._modules
        self.container._modules = {"0": only}
        try:
            yield only
        finally:
            self.container._modules = blocks

    def _capture(self, tokens: Tensor) -> list[tuple[tuple, dict[str, Any]]]:
        """What the model passes each block besides the states: masks, position embeddings."""
        captured: list[tuple[tuple, dict[str, Any]]] = []

        def keep(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            captured.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self.blocks]
        try:
            self.model(tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return captured

    def _sequential(self, tokens: Tensor) -> bool:
        """Whether a block is its attention followed by its MLP; otherwise the two read the same stream."""
        states = self.embed(tokens)
        args, kwargs = self._arguments[0]
        attention, mlp = (self.view(0, frozenset({kind})) for kind in reversed(KINDS))
        one_by_one = mlp(attention(states, *args, **kwargs), *args, **kwargs)
        return torch.equal(one_by_one, self.blocks[0](states, *args, **kwargs))


class _Catch(nn.Module):
    """Stands for all blocks and keeps what they are given."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.states = hidden_states
        return hidden_states


class _Inject(nn.Module):
    """Stands for all blocks and hands over what they would give."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.states


@dataclass
class Work:
    """How much was done."""

    sublayer_passes: int = 0
    """(sublayer, window) forwards."""
    evaluations: int = 0
    """(candidate) evaluations begun."""


class Window:
    """One calibration window: the whole model's output on it, and the trunk of the model as it stands."""

    def __init__(self, blocks: Blocks, tokens: Tensor, divergence: Divergence) -> None:
        """
        Args:
            tokens: ids, (tokens,)
        """
        self.blocks = blocks
        self.divergence = divergence
        self.n_tokens = tokens.shape[0]
        states = blocks.embed(tokens[None])
        self.trunk = [states]
        """The stream before every unit, and after the last: (1, tokens, hidden) each."""
        for unit in blocks.units:
            states = blocks.run(unit, states, ())
            self.trunk.append(states)
        logits = blocks.logits(states)[0].float()
        if not logits.isfinite().all():
            raise ValueError("the whole model's logits are not finite on the calibration tokens; try float32")
        self.chunk = max(1, DIVERGENCE_LOGITS // logits.shape[-1])
        self.reference: list[Reference] = [divergence.reference(part) for part in logits.split(self.chunk)]

    def remove(self, removed: frozenset[Sublayer], first_unit: int) -> None:
        """Bring the trunk up to date once the sublayers up to `removed` are gone, the newest from `first_unit` on."""
        states = self.trunk[first_unit]
        for depth in range(first_unit, len(self.blocks.units)):
            states = self.blocks.run(self.blocks.units[depth], states, removed)
            self.trunk[depth + 1] = states

    def total(self, states: Tensor, limit: float = float("inf"), already: float = 0.0) -> float:
        """Sum over the window's tokens of the divergence of a model that ends in `states`, plus `already`.

        Stops early once the sum is over `limit`; what it returns then is over the limit too. A non-finite output is
        infinitely far.
        """
        logits = self.blocks.logits(states)[0]
        total = already
        for reference, part in zip(self.reference, logits.split(self.chunk), strict=True):
            total += self.divergence.per_token(reference, part.float()).sum(dtype=torch.float64).item()
            if not total <= limit:
                break
        return total if total == total else float("inf")

    def branches(
        self, candidates: Sequence[tuple[int, Candidate]], removed: frozenset[Sublayer], work: Work
    ) -> Tensor:
        """Where the model ends without each candidate.

        Args:
            candidates: with the unit each starts at, by depth.

        Returns:
            (candidates, tokens, hidden)
        """
        states = self.trunk[0].new_empty(len(candidates), *self.trunk[0].shape[1:])
        n_live = 0
        for depth in range(candidates[0][0], len(self.blocks.units)):
            unit = self.blocks.units[depth]
            n_before = n_live
            while n_live < len(candidates) and candidates[n_live][0] == depth:
                states[n_live] = self.trunk[depth][0]
                n_live += 1
            # A whole block is a candidate of two units: at the second one, it is a branch that skips again.
            n_plain = n_before
            while n_plain > 0 and not set(unit.sublayers).isdisjoint(candidates[n_plain - 1][1].sublayers):
                n_plain -= 1
            self._advance(unit, states[:n_plain], removed, work)
            for branch in range(n_plain, n_live):
                gone = removed.union(candidates[branch][1].sublayers)
                self._advance(unit, states[branch : branch + 1], gone, work)
        return states

    def _advance(self, unit: Unit, states: Tensor, removed: frozenset[Sublayer], work: Work) -> None:
        """Run `states` through a unit, in place."""
        n_run = len(unit.kinds) - len(removed.intersection(unit.sublayers))
        if len(states) == 0 or (n_run == 0 and len(unit.kinds) == 1):
            return
        work.sublayer_passes += n_run * states.shape[0]
        for batch in states.split(max(1, MICRO_BATCH_TOKENS // self.n_tokens)):
            batch.copy_(self.blocks.run(unit, batch, removed))


@dataclass(frozen=True)
class Outcome:
    """What evaluating the candidates of one step came to, in mean divergence per token."""

    values: dict[Candidate, float]
    """Those evaluated on every window."""
    abandoned: dict[Candidate, float]
    """Those given up, with the lower bound they had reached."""
    work: Work


class Sweep:
    """Evaluates candidates against the whole model on the calibration tokens, on top of earlier removals."""

    def __init__(
        self, model: PreTrainedModel, layout: Layout, tokens: Tensor, divergence: Divergence, removed: Iterable[Sublayer] = ()
    ) -> None:
        """
        Args:
            tokens: calibration token ids, (samples, tokens)
            removed: sublayers that are gone already, when a search is resumed.
        """
        tokens = tokens.to(model.device)
        with torch.inference_mode():
            self.blocks = Blocks(model, layout, tokens[:1])
            self.windows = [Window(self.blocks, window, divergence) for window in tokens]
        self.n_tokens = tokens.numel()
        self.removed: frozenset[Sublayer] = frozenset()
        self._start = {s: depth for depth, unit in enumerate(self.blocks.units) for s in unit.sublayers}
        if removed:
            self.remove(removed)

    @property
    def n_sublayers(self) -> int:
        return len(self._start) - len(self.removed)

    @torch.inference_mode()
    def remove(self, sublayers: Iterable[Sublayer]) -> None:
        """Make a removal for good: later candidates are judged on top of it."""
        new = frozenset(sublayers)
        self.removed |= new
        first = min(self._start[s] for s in new)
        for window in self.windows:
            window.remove(self.removed, first)

    @torch.inference_mode()
    def divergence(self) -> float:
        """Of the model as it stands."""
        return sum(window.total(window.trunk[-1]) for window in self.windows) / self.n_tokens

    @torch.inference_mode()
    def evaluate(
        self,
        candidates: Sequence[Candidate],
        abandon: bool = True,
        progress: Callable[[], Any] = lambda: None,
    ) -> Outcome:
        """Divergence of the model without each candidate.

        With `abandon`, a candidate is given up as soon as what it has come to is more than another's whole value.
        That is exact: divergences are sums of terms that are never negative. The least value, and every value at or
        below it, is always found.

        Args:
            progress: called after every window.
        """
        work = Work(evaluations=len(candidates))
        sums = dict.fromkeys(sorted(candidates), 0.0)
        seen = dict.fromkeys(sums, 0)
        best = float("inf")

        def advance(group: Sequence[Candidate], window: int) -> None:
            starting = [(self._start[c.sublayers[0]], c) for c in group]
            ends = self.windows[window].branches(starting, self.removed, work)
            for candidate, end in zip(group, ends, strict=True):
                limit = best if abandon else float("inf")
                sums[candidate] = self.windows[window].total(end[None], limit, sums[candidate])
                seen[candidate] = window + 1

        def finish(candidate: Candidate) -> None:
            nonlocal best
            for window in range(seen[candidate], len(self.windows)):
                if sums[candidate] > best:
                    return
                advance([candidate], window)
            best = min(best, sums[candidate])

        alive = list(sums)
        for window in range(len(self.windows)):
            if alive:
                advance(alive, window)
                alive = [c for c in alive if not (abandon and sums[c] > best)]
                if window == len(self.windows) - 1:
                    best = min([best, *(sums[c] for c in alive)])
                elif abandon and alive:
                    # The one in front now is mostly the one in front at the end: its value is the next bound.
                    finish(min(alive, key=sums.__getitem__))
                    alive = [c for c in alive if seen[c] == window + 1 and not sums[c] > best]
            progress()
        complete = {c for c in sums if seen[c] == len(self.windows) and not (abandon and sums[c] > best)}
        means = {c: total / self.n_tokens for c, total in sums.items()}
        return Outcome(
            values={c: m for c, m in means.items() if c in complete},
            abandoned={c: m for c, m in means.items() if c not in complete},
            work=work,
        )
