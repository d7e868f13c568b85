"""Finds the sublayers of an undeclared model by running it.

The blocks are a list of `num_hidden_layers` modules. One forward records each block's own modules. The modules whose
output at the last token depends on the tokens before are the attention; the last other module with matrices, and those
that are given the same, are the MLP; modules that feed only a core, or are fed only by it, belong to its sublayer. A
core may add to the stream by itself: it is given the stream as another argument.
Blocks that call the same modules are alike: one of each sort is looked at. The result is verified: a block without its
sublayers still hands on the stream, and removing any sublayer equals masking it, with a cache and without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from finercut.model.caches import forward
from finercut.model.families import EXAMPLE, FAMILIES, LAYOUT_KEY, Branch, Layout, Variant, declared
from finercut.model.masking import masked
from finercut.model.modeling_finercut import (
    branch_of,
    bypass,
    cache_config,
    cached_by,
    counting,
    followers,
    numbered,
    readers,
    renumber,
)
from finercut.sublayers import KINDS, Sublayer

N_TOKENS = 8
# Differences below this share of the norm count as rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# How a model fails of which a part is bypassed that was something else, or that lacks an input.
_FAILURES = (ValueError, TypeError, AttributeError, IndexError, KeyError, RuntimeError, StopIteration)


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

    @cached_property
    def stream(self) -> int | str | None:
        """The argument that the module adds to, by its position or name."""
        for key, value in {**dict(enumerate(self.args)), **self.kwargs}.items():
            if value is self.given or not _is_states(value) or value.shape != self.given.shape:
                continue
            without = self.replaced(value, torch.zeros_like(value))
            if without.shape == value.shape and _close(self.repeat(self.given) - without, value):
                return key
        return None

    def feeds(self, other: _Call) -> bool:
        """Whether its result is what `other` alone is given, perhaps in another shape; the stream is everybody's."""
        return (
            self.result.numel() == other.given.numel()
            and torch.equal(self.result.flatten(), other.given.flatten())
            and self.stream is None
        )

    def reads_what(self, other: _Call) -> bool:
        """Whether both are given the same, perhaps in another shape."""
        return self.given.numel() == other.given.numel() and torch.equal(self.given.flatten(), other.given.flatten())

    def mixes_tokens(self) -> bool:
        """Whether other tokens before the last change the result at the last one; a sparse attention may pass over any
        single one."""
        if self.given.dim() != 3:
            return False
        other = self.given.clone()
        other[:, :-1] = other[:, :-1].flip(-1) + 1
        # More than the rounding that experts show when others of their tokens change.
        one, two = (self.repeat(states).reshape(states.shape[0], N_TOKENS, -1) for states in (self.given, other))
        return not _close(two[:, -1], one[:, -1], 1e-3)

    def repeat(self, states: Tensor) -> Tensor:
        """The result for other states, or again: what was recorded may have been added to in place."""
        return self.replaced(self.given, states)

    def replaced(self, one: Tensor, other: Tensor) -> Tensor:
        """The result for another tensor among the arguments."""
        args = [other if value is one else value for value in self.args]
        kwargs = {name: other if value is one else value for name, value in self.kwargs.items()}
        return _first(self.module(*args, **kwargs))


@torch.no_grad()
def find_layout(model: PreTrainedModel) -> Layout:
    """Where an undeclared model keeps its sublayers, or one whose language model lies inside.

    Args:
        model: on any device, in evaluation mode; is as it was afterwards.

    Raises:
        ValueError: what was found is not one attention or one MLP a block, or both, whose outputs are added to the
            stream; says what was found and how to declare it. Or text alone does not run all blocks.
    """
    language = model.config.get_text_config()
    tokens = torch.arange(1, 1 + N_TOKENS, device=model.device)[None] % language.vocab_size
    name, blocks = _blocks(model, tokens)
    if language is not model.config and language.model_type in FAMILIES:
        return replace(declared(language), blocks=name)
    members = {(i, child): module for i, block in enumerate(blocks) for child, module in block.named_children()}
    calls: list[list[_Call]] = [[] for _ in blocks]
    for (i, child), call in _watch(model, members, tokens):
        calls[i].append(replace(call, name=child))
    found = f"blocks at {name!r} ({len(blocks)} x {type(blocks[0]).__name__}), which call {_listed(calls[0])}"
    try:
        layout = _layout(name, calls)
        _check_members(blocks, layout)
        runs = [call for _, call in _watch(model, dict(enumerate(blocks)), tokens)]
        layout = _checked(model, runs, layout)
        _check_cache(model, blocks, layout, tokens)
    except _FAILURES as error:
        # What stands in a core's place looks for states among its arguments.
        reason = "what seems to be a core is given no hidden states" if isinstance(error, StopIteration) else error
        raise ValueError(
            f"cannot tell the sublayers of this {model.config.model_type} model: {reason}. Found {found}. "
            f"If you know better, write into config.json, as {LAYOUT_KEY!r}, what is like {EXAMPLE}"
        ) from error
    return layout


def _is_states(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _listed(calls: Sequence[_Call]) -> str:
    return ", ".join(f"{c.name} ({type(c.module).__name__})" for c in calls)


def _blocks(model: PreTrainedModel, tokens: Tensor) -> tuple[str, list[nn.Module]]:
    kind, n_blocks = model.config.model_type, model.config.get_text_config().num_hidden_layers
    lists = [(n, list(m)) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    fitting = [(n, m) for n, m in lists if len(m) == n_blocks]
    if not fitting:
        found = ", ".join(name for name, _ in lists)
        raise ValueError(
            f"cannot tell the blocks of this {kind} model: none of its lists holds {n_blocks} modules. Found "
            f"{found or 'no lists'}"
        )
    members = {(n, i): module for n, of in fitting for i, module in enumerate(of)}
    try:
        ran = {key for key, _ in _watch(model, members, tokens)}
    except _FAILURES as error:
        raise ValueError(f"cannot prune a {kind} model: it does not run on text alone: {error}") from error
    # Blocks of a vision or audio part do not run on text.
    counts = {name: sum((name, i) in ran for i in range(n_blocks)) for name, _ in fitting}
    name, blocks = min(fitting, key=lambda one: (-counts[one[0]], len(set(map(type, one[1])))))
    if counts[name] < n_blocks and model.config.get_text_config() is not model.config:
        raise ValueError(
            f"cannot prune a {kind} model: of its {n_blocks} blocks text alone runs {counts[name]}, and the search has "
            "nothing but text"
        )
    return name, blocks


def _watch(model: PreTrainedModel, modules: Mapping[Any, nn.Module], tokens: Tensor) -> list[tuple[Any, _Call]]:
    """The calls of `modules` in one forward, in order, each with its key there."""
    calls: list[tuple[Any, _Call]] = []
    keys = {id(module): key for key, module in modules.items()}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Dropouts do nothing here, and other implementations of a model have none.
        if isinstance(module, nn.Dropout):
            return
        if any(map(_is_states, (*args, *kwargs.values()))) and _is_states(_first(output)):
            key = keys[id(module)]
            calls.append((key, _Call(str(key), module, args, kwargs, output)))

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules.values()]
    try:
        model(tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _layout(name: str, calls: Sequence[Sequence[_Call]]) -> Layout:
    """Of the calls of every block."""
    sorts: dict[tuple, tuple[Branch | None, Branch | None]] = {}
    found: dict[tuple[Branch | None, Branch | None], list[int]] = {}
    handed = _handed_on(calls)
    for block, own in enumerate(calls):
        sort = tuple((call.name, type(call.module), type(call.output)) for call in own)
        if sort not in sorts:
            sorts[sort] = _branches(own, handed)
        found.setdefault(sorts[sort], []).append(block)
    if not any(attention for attention, _ in found):
        raise ValueError("0 of a block's modules let tokens see each other, not one attention")
    usual = max(found, key=lambda pair: len(found[pair]))
    variants = tuple(Variant(tuple(at), *pair) for pair, at in found.items() if pair != usual)
    return Layout(name, *usual, variants=variants)


def _handed_on(calls: Sequence[Sequence[_Call]]) -> dict[str, tuple[int, str]]:
    """The modules that are given, by name, an output of the same module of the block before: which output, and how the
    argument is called."""
    return {
        later.name: (position, name)
        for one, two in pairwise(calls)
        for earlier in one
        for later in two
        if earlier.name == later.name and isinstance(earlier.output, tuple)
        for position, output in enumerate(earlier.output)
        for name, value in later.kwargs.items()
        if value is output and torch.is_tensor(value)
    }


def _branches(calls: Sequence[_Call], handed: Mapping[str, tuple[int, str]]) -> tuple[Branch | None, Branch | None]:
    """A block's attention and its MLP."""
    mixing = [i for i, call in enumerate(calls) if call.mixes_tokens()]
    # Norms have no matrices; what a family does after its last one is not part of a sublayer.
    plain = [i for i, call in enumerate(calls) if call.has_matrices and i not in mixing]
    last = [i for i in plain if i == plain[-1] or calls[i].reads_what(calls[plain[-1]])]
    attention, mlp = (_branch(calls, cores, handed) if cores else None for cores in (mixing, last))
    if attention and mlp and (both := set(attention.members).intersection(mlp.members)):
        raise ValueError(f"{', '.join(sorted(both))} runs for the attention and for the MLP")
    return attention, mlp


def _branch(calls: Sequence[_Call], cores: Sequence[int], handed: Mapping[str, tuple[int, str]]) -> Branch:
    """The cores, and the chains of modules that run for them alone."""
    paths = []
    members = set(cores)
    for core in cores:
        first = core
        while first > 0 and first - 1 not in members and _feeds_only(calls, first - 1, members):
            first -= 1
            members.add(first)
        last = core
        while last + 1 < len(calls) and last + 1 not in members and calls[last].feeds(calls[last + 1]):
            last += 1
            members.add(last)
        names = [call.name for call in calls]
        output = calls[core].output
        n_outputs = len(output) if isinstance(output, tuple) else 1
        before, after = tuple(names[first:core]), tuple(names[core + 1 : last + 1])
        hands_on = handed.get(names[core])
        paths.append(Branch(names[core], before, after, n_outputs, calls[core].stream, hands_on))
    return replace(paths[0], beside=tuple(paths[1:]))


def _checked(model: PreTrainedModel, runs: Sequence[_Call], layout: Layout) -> Layout:
    """The layout with `sequential` as it is, or the nearest one whose blocks do without their sublayers."""
    # Norms that lie on the stream stay, and those that blocks ask for more than an output. Some blocks expect several
    # outputs of a class of their experts, and one of anything else.
    nearest = [layout, _changed(layout, KINDS, before=()), _changed(layout, ("mlp",), n_outputs=1)]
    if nearest[2] == layout:
        nearest.pop()

    def checked(attempt: Layout) -> Layout:
        sequential = [_check_block(model, number, run, attempt) for number, run in enumerate(runs)]
        return replace(attempt, sequential=all(sequential))

    for attempt in nearest[:-1]:
        with suppress(AttributeError, TypeError, ValueError):
            return checked(attempt)
    return checked(nearest[-1])


def _changed(layout: Layout, kinds: Iterable[str], **changes: Any) -> Layout:
    """The layout with these changes in its branches of some kinds."""

    def of(branch: Branch | None) -> Branch | None:
        return branch and replace(branch, **changes, beside=tuple(map(of, branch.beside)))

    def changed(where: Any) -> Any:
        return replace(where, **{kind: of(getattr(where, kind)) for kind in kinds})

    return replace(changed(layout), variants=tuple(map(changed, layout.variants)))


def _feeds_only(calls: Sequence[_Call], one: int, members: set[int]) -> bool:
    fed = {i for i, call in enumerate(calls) if calls[one].feeds(call)}
    return bool(fed) and fed <= members


def _check_members(blocks: Sequence[nn.Module], layout: Layout) -> None:
    for number, block in enumerate(blocks):
        attention = layout.branch("attention", number)
        for path in attention.paths if attention else ():
            if not cached_by(block.get_submodule(path.core)):
                raise ValueError(f"{path.core} has no layer_idx to give it another layer of the KV cache")


@contextmanager
def _without(block: nn.Module, number: int, kinds: Iterable[str], layout: Layout) -> Iterator[None]:
    replaced: dict[str, nn.Module] = {}
    for kind in kinds:
        replaced |= bypass(block, kind, branch_of(layout.to_dict(), kind, number))
    try:
        yield
    finally:
        for name, module in replaced.items():
            block.set_submodule(name, module)


def _check_block(model: PreTrainedModel, number: int, call: _Call, layout: Layout) -> bool:
    """That it has a stream beside its sublayers; returns whether it is its attention followed by its MLP."""
    states = call.given

    def run(states: Tensor, *without: str) -> Tensor:
        with _without(call.module, number, without, layout):
            return call.repeat(states)

    kinds = [kind for kind in KINDS if layout.branch(kind, number)]
    bare = run(states, *kinds)
    # Norms on the stream, scales and smaller branches stay in a block whose sublayers are gone.
    nothing_else = _close(bare, states)
    if not nothing_else and _close(run(states.flip(-1), *kinds), bare):
        cores = " and ".join(path.core for kind in kinds for path in layout.branch(kind, number).paths)
        raise ValueError(
            f"block {number} without {cores} does not hand on what it is given: they do more than add to the stream"
        )
    for kind in kinds:
        with masked(model, [Sublayer(number, kind)], layout):
            if not _close(call.repeat(states), run(states, kind)):
                raise ValueError(f"block {number} less its {kind} is not the block with that masked")
    return nothing_else and _close(run(run(states, "mlp"), "attention"), run(states))


def _check_cache(model: PreTrainedModel, blocks: Sequence[nn.Module], layout: Layout, tokens: Tensor) -> None:
    """That the attentions can be numbered anew once the first is gone, as pruned models do."""
    config = model.config.get_text_config()
    reading = readers(config)
    needed = {*reading.values(), *followers(config).values()}
    caching = [i for i in range(len(blocks)) if layout.branch("attention", i) and i not in reading]
    lasting = counting(config, caching)
    gone = next((i for i in caching if lasting != [i] and caching != [i] and i not in needed), None)
    if gone is None:
        return
    kept = numbered(config, [i for i in caching if i != gone])
    # Where the config does not tell the kinds of layers, a cache makes one for each attention that asks; and one of the
    # model's own class, such as MiniMax's, is not told.
    own = type(forward(model, tokens[:, :1])[1])
    told = own is DynamicCache and getattr(config, "layer_types", None) is not None

    def in_parts(cache: Cache) -> Tensor:
        parts = tokens.split([N_TOKENS - 2, 1, 1], 1)
        return torch.cat([forward(model, part, cache)[0].logits for part in parts], 1)

    with masked(model, [Sublayer(gone, "attention")], layout):
        # Some state space models compute something else with a cache than without: that is the whole model's own.
        expected = in_parts(DynamicCache(config=config) if told else own())
    with _without(blocks[gone], gone, ["attention"], layout):
        described = layout.to_dict()
        renumber(blocks, config, described, {i: position for position, i in enumerate(kept)})
        try:
            cache = DynamicCache(config=cache_config(config, kept)) if told else own()
            found = in_parts(cache)
        finally:
            renumber(blocks, config, described, {i: i for i in kept})
    if len(cache) != len(kept) or not _close(found, expected):
        raise ValueError(f"without the attention of block {gone} and with a KV cache it computes something else")


def _close(a: Tensor, b: Tensor, tolerance: float | None = None) -> bool:
    difference, size = (a - b).float().norm().item(), b.float().norm().item()
    return difference <= (tolerance or TOLERANCE[a.dtype]) * size
