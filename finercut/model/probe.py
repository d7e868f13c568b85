"""Finds the sublayers of an undeclared model by running it.

The blocks are the longest list of equal modules. One forward records each block's own modules. The module whose
output at the last token depends on the token before is the attention; the last other module with matrices is the MLP;
modules that feed only a core, or are fed only by it, belong to its sublayer. The result is verified: a block without
its sublayers returns its input, and removing any sublayer equals masking it, with a KV cache and without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from finercut.model.families import EXAMPLE, LAYOUT_KEY, Branch, Layout
from finercut.model.masking import masked
from finercut.model.modeling_finercut import bypass, cached_by
from finercut.sublayers import KINDS, Sublayer

N_TOKENS = 8
# Differences below this share of the norm count as rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class _Call:
    """One call of a block's own module."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def given(self) -> Tensor:
        return next(x for x in (*self.args, *self.kwargs.values()) if _is_states(x))

    @property
    def result(self) -> Tensor:
        return _first(self.output)

    @property
    def has_matrices(self) -> bool:
        return any(p.dim() > 1 for p in self.module.parameters())

    def feeds(self, other: _Call) -> bool:
        """Whether its result is what `other` is given, perhaps in another shape."""
        return self.result.numel() == other.given.numel() and torch.equal(self.result.flatten(), other.given.flatten())

    def mixes_tokens(self) -> bool:
        """Whether another token before the last changes the result at the last one."""
        if self.given.dim() != 3:
            return False
        other = self.given.clone()
        other[:, -2] = other[:, -2].flip(-1) + 1
        # More than the rounding that experts show when others of their tokens change.
        one, two = (self.repeat(states).reshape(states.shape[0], N_TOKENS, -1) for states in (self.given, other))
        return not _close(two[:, -1], one[:, -1], 1e-3)

    def repeat(self, states: Tensor) -> Tensor:
        """The result for other states, or again: what was recorded may have been added to in place."""
        args = [states if value is self.given else value for value in self.args]
        kwargs = {name: states if value is self.given else value for name, value in self.kwargs.items()}
        return _first(self.module(*args, **kwargs))


@torch.no_grad()
def find_layout(model: PreTrainedModel) -> Layout:
    """Where an undeclared model keeps its sublayers.

    Args:
        model: on any device, in evaluation mode; is as it was afterwards.

    Raises:
        ValueError: what was found is not one attention and one MLP a block whose outputs are added to the stream; says
            what was found and how to declare it.
    """
    tokens = torch.arange(1, 1 + N_TOKENS, device=model.device)[None] % model.config.vocab_size
    name, blocks = _blocks(model)
    calls = _watch(model, dict(blocks[0].named_children()), tokens)
    found = f"blocks at {name!r} ({len(blocks)} x {type(blocks[0]).__name__}), which call {_listed(calls)}"
    try:
        layout = _layout(name, calls)
        _check_members(blocks, layout)
        runs = _watch(model, dict(enumerate(blocks)), tokens)
        sequential = [_check_block(model, number, run, layout) for number, run in enumerate(runs)]
        layout = replace(layout, sequential=all(sequential))
        _check_cache(model, blocks, layout, tokens)
    # A model may fail in any of these ways when a part of it is bypassed that was something else.
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"cannot tell the sublayers of this {model.config.model_type} model: {error}. Found {found}. "
            f"If you know better, write into config.json, as {LAYOUT_KEY!r}, what is like {EXAMPLE}"
        ) from error
    return layout


def _is_states(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _listed(calls: Sequence[_Call]) -> str:
    return ", ".join(f"{c.name} ({type(c.module).__name__})" for c in calls)


def _blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    lists = [(n, list(m)) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    equal = [(n, m) for n, m in lists if len(m) == model.config.num_hidden_layers and len(set(map(type, m))) == 1]
    if not equal:
        n_blocks, found = model.config.num_hidden_layers, ", ".join(name for name, _ in lists)
        raise ValueError(
            f"cannot tell the blocks of this {model.config.model_type} model: none of its lists holds {n_blocks} "
            f"modules of one class. Found {found or 'no lists'}"
        )
    return equal[0]


def _watch(model: PreTrainedModel, modules: Mapping[Any, nn.Module], tokens: Tensor) -> list[_Call]:
    """The calls of `modules` in one forward, in order."""
    calls: list[_Call] = []
    names = {id(module): str(name) for name, module in modules.items()}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Dropouts do nothing here, and other implementations of a model have none.
        if isinstance(module, nn.Dropout):
            return
        if any(map(_is_states, (*args, *kwargs.values()))) and _is_states(_first(output)):
            calls.append(_Call(names[id(module)], module, args, kwargs, output))

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules.values()]
    try:
        model(tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _layout(name: str, calls: Sequence[_Call]) -> Layout:
    mixing = [i for i, call in enumerate(calls) if call.mixes_tokens()]
    if len(mixing) != 1:
        raise ValueError(f"{len(mixing)} of a block's modules let tokens see each other, not one attention")
    # Norms have no matrices; what a family does after its last one is not part of a sublayer.
    plain = [i for i, call in enumerate(calls) if call.has_matrices and i not in mixing]
    if not plain:
        raise ValueError("a block has no MLP beside its attention")
    attention, mlp = (_branch(calls, core) for core in (mixing[0], plain[-1]))
    if both := set(attention.members).intersection(mlp.members):
        raise ValueError(f"{', '.join(sorted(both))} runs for the attention and for the MLP")
    return Layout(name, attention, mlp)


def _branch(calls: Sequence[_Call], core: int) -> Branch:
    """The core, and the chain of modules that run for it alone."""
    first = core
    while first > 0 and [c for c in calls if calls[first - 1].feeds(c)] == [calls[first]]:
        first -= 1
    last = core
    while last + 1 < len(calls) and calls[last].feeds(calls[last + 1]):
        last += 1
    names = [call.name for call in calls]
    output = calls[core].output
    return Branch(
        names[core],
        before=tuple(names[first:core]),
        after=tuple(names[core + 1 : last + 1]),
        n_outputs=len(output) if isinstance(output, tuple) else 1,
    )


def _check_members(blocks: Sequence[nn.Module], layout: Layout) -> None:
    for number, block in enumerate(blocks):
        members = (*layout.attention.members, *layout.mlp.members)
        if missing := [name for name in members if not hasattr(block, name)]:
            raise ValueError(f"block {number} is unlike block 0, it has no {', '.join(missing)}")
        if not cached_by(getattr(block, layout.attention.core)):
            raise ValueError(f"{layout.attention.core} has no layer_idx to give it another layer of the KV cache")


@contextmanager
def _without(block: nn.Module, kinds: Iterable[str], layout: Layout) -> Iterator[None]:
    replaced: dict[str, nn.Module] = {}
    for kind in kinds:
        replaced |= bypass(block, kind, layout.to_dict())
    try:
        yield
    finally:
        for name, module in replaced.items():
            setattr(block, name, module)


def _check_block(model: PreTrainedModel, number: int, call: _Call, layout: Layout) -> bool:
    """That its sublayers only add to the stream; returns whether it is its attention followed by its MLP."""
    states = call.given

    def run(states: Tensor, *without: str) -> Tensor:
        with _without(call.module, without, layout):
            return call.repeat(states)

    if not _close(run(states, *KINDS), states):
        raise ValueError(
            f"block {number} without {layout.attention.core} and {layout.mlp.core} does not hand on what it is given: "
            "it has more sublayers, they do more than add to the stream, or norms lie on it"
        )
    for kind in KINDS:
        with masked(model, [Sublayer(number, kind)], layout):
            if not _close(call.repeat(states), run(states, kind)):
                raise ValueError(f"block {number} less its {kind} is not the block with that masked")
    return _close(run(run(states, "mlp"), "attention"), run(states))


def _check_cache(model: PreTrainedModel, blocks: Sequence[nn.Module], layout: Layout, tokens: Tensor) -> None:
    """That the attentions can be numbered anew once the first is gone, as pruned models do."""
    moved = [module for block in blocks[1:] for module in cached_by(getattr(block, layout.attention.core))]
    with masked(model, [Sublayer(0, "attention")], layout):
        expected = model(tokens, use_cache=False).logits
    with _without(blocks[0], ["attention"], layout):
        for module in moved:
            module.layer_idx -= 1
        try:
            cache = DynamicCache()
            parts = [
                model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split(N_TOKENS - 2, 1)
            ]
        finally:
            for module in moved:
                module.layer_idx += 1
    if len(cache.layers) != len(blocks) - 1 or not _close(torch.cat(parts, 1), expected):
        raise ValueError("without the attention of block 0 and with a KV cache it computes something else")


def _close(a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    difference, size = (a - b).float().norm().item(), b.float().norm().item()
    return difference <= (tolerance or TOLERANCE[a.dtype]) * size
