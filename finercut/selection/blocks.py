"""Runs a model sublayer by sublayer, by its own code.

A block whose MLP is bypassed is its attention, and the other way round. What surrounds the blocks (embeddings, final
norm, head) is the model with one stand-in for all of its blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finercut.model.families import Layout
from finercut.model.modeling_finercut import branch_of, bypass
from finercut.sublayers import KINDS, Sublayer


@dataclass(frozen=True)
class Unit:
    """What runs as one: a sublayer, or a whole block whose sublayers are not sequential."""

    block: int
    kinds: tuple[str, ...]

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        return tuple(Sublayer(self.block, kind) for kind in self.kinds)


class Blocks:
    """A model's blocks, run one unit at a time without any chosen sublayers."""

    def __init__(self, model: PreTrainedModel, layout: Layout, tokens: Tensor) -> None:
        """
        Args:
            tokens: ids, (1, tokens), of the length that will be run.
        """
        self.model = model
        self.layout = layout
        self._layout = layout.to_dict()
        self.blocks = list(model.get_submodule(layout.blocks))
        self._views: dict[tuple[int, frozenset[str]], nn.Module] = {}
        self.width = 0
        """Of the residual stream."""
        self.vocabulary = 0
        """Logits a token, as the head gives them."""
        self._arguments = self._capture(tokens)
        here = layout.sublayers(len(self.blocks))
        if layout.sequential:
            self.units = [Unit(sublayer.block, (sublayer.kind,)) for sublayer in here]
        else:
            blocks = [[s.kind for s in here if s.block == i] for i in range(len(self.blocks))]
            self.units = [Unit(i, tuple(kinds)) for i, kinds in enumerate(blocks) if kinds]

    @property
    def widest(self) -> int:
        """The most numbers that a token has between two of the blocks' matrices. Configs have no name for it that all
        families share."""
        matrices = (p for block in self.blocks for p in block.parameters() if p.dim() > 1)
        return max((max(p.shape[-2:]) for p in matrices), default=self.width)

    def view(self, block: int, without: frozenset[str]) -> nn.Module:
        """The block with some kinds bypassed; shares its weights."""
        key = (block, without)
        if key not in self._views:
            view = _shallow(self.blocks[block])
            for kind in sorted(without):
                bypass(view, kind, branch_of(self._layout, kind, block))
            self._views[key] = view
        return self._views[key]

    def module(self, unit: Unit, removed: Iterable[Sublayer]) -> nn.Module | None:
        """What runs for a unit: its block, reduced to the unit's kept sublayers. None where there is none that runs."""
        gone = frozenset(s.kind for s in removed if s.block == unit.block)
        if len(unit.kinds) == 1:
            if gone.issuperset(unit.kinds):
                return None
            gone = frozenset(KINDS) - set(unit.kinds)
        return self.view(unit.block, gone)

    def run(self, unit: Unit, states: Tensor, removed: Iterable[Sublayer]) -> Tensor:
        """One unit on (batch, tokens, hidden) states; `removed` may name sublayers of other units too."""
        module = self.module(unit, removed)
        if module is None:
            return states
        args, kwargs = self._arguments[unit.block]
        return _states(module(states, *args, **kwargs))

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) ids -> (batch, tokens, hidden): the first block's input."""
        catch = _StandIn(self.blocks[0], self._n_outputs)
        self._run(self._around(catch), tokens)
        return catch.states

    def logits(self, states: Tensor) -> Tensor:
        """(batch, tokens, hidden) after the last block -> (batch, tokens, vocab), all by the model's own code."""
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        return self._run(self._around(_StandIn(self.blocks[0], self._n_outputs, states)), ids).logits

    def _run(self, model: nn.Module, tokens: Tensor) -> Any:
        # Routers' logits are there for a loss only, and a model none of whose routers ran fails at it.
        routers = {"output_router_logits": False} if hasattr(self.model.config, "output_router_logits") else {}
        return model(tokens, use_cache=False, **routers)

    def _around(self, only: nn.Module) -> nn.Module:
        """The model with `only` in place of all of its blocks; shares its weights."""
        model = _shallow(self.model)
        *parents, last = self.layout.blocks.split(".")
        holder = model
        for name in parents:
            holder._modules[name] = _shallow(holder._modules[name])
            holder = holder._modules[name]
        holder._modules[last] = nn.ModuleList([only])
        return model

    def _capture(self, tokens: Tensor) -> list[tuple[tuple, dict[str, Any]]]:
        """The arguments that the model passes each block besides the states: masks, position embeddings."""
        captured: list[tuple[tuple, dict[str, Any]]] = []

        def keep(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            captured.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
            self.width = (args[0] if args else kwargs["hidden_states"]).shape[-1]
            self._n_outputs = len(output) if isinstance(output, tuple) else None

        hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in self.blocks]
        try:
            self.vocabulary = self._run(self.model, tokens).logits.shape[-1]
        finally:
            for hook in hooks:
                hook.remove()
        return captured


def _states(output: Any) -> Tensor:
    """A block's output states: in some families the first of several outputs."""
    return output[0] if isinstance(output, tuple) else output


def _shallow(module: nn.Module) -> nn.Module:
    """Another module with the same parameters and children, whose children can be replaced."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    if hasattr(module, "_hf_hook"):
        # accelerate, which spreads a model over devices, puts a forward on the instance that is bound to it.
        copied._old_forward = MethodType(module._old_forward.__func__, copied)
        copied.forward = partial(module.forward.func, copied)
    return copied


class _StandIn(nn.Module):
    """Stands in for all blocks: records its input, and returns `states` if it has any."""

    def __init__(self, block: nn.Module, n_outputs: int | None, states: Tensor | None = None) -> None:
        """
        Args:
            block: whose attributes the model reads, such as its type, to choose a mask.
            n_outputs: of a block, the first of which are the states; None where it hands on the states alone.
        """
        super().__init__()
        object.__setattr__(self, "block", block)  # Not a submodule: its weights are not run.
        self.n_outputs = n_outputs
        self.states = states

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.states is None:
            self.states = hidden_states
        return self.states if self.n_outputs is None else (self.states, *[None] * (self.n_outputs - 1))
