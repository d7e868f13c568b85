"""Runs a model sublayer by sublayer, by its own code.

A block whose MLP is bypassed is its attention, and the other way round. What surrounds the blocks (embeddings, final
norm, head) is the model with stand-ins for its blocks.

Most models give a block nothing else that depends on the tokens. Where one does, a state carries it at the end of each
token's stream: inputs that a model makes of the tokens for every block (Gemma 3n, Gemma 4), the ids themselves
(DeepSeek-V4), keys and values that later blocks read, and the tokens that an attention chose for later ones (GLM-5).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finercut.model.families import Layout
from finercut.model.modeling_finercut import branch_of, bypass
from finercut.sublayers import Sublayer


@dataclass(frozen=True)
class Unit:
    """What runs as one: a sublayer, or all of a module whose sublayers are not sequential."""

    module: int
    """In the list of blocks."""
    sublayers: tuple[Sublayer, ...]


Given = dict[int | str, Any]
"""What a block is given besides the stream, by position after it or by name."""


@dataclass(frozen=True)
class _Place:
    """Where a state has what belongs to its tokens in some tensor."""

    start: int
    shape: tuple[int, ...]
    """Of a token's part: the tensor's dimensions that are neither samples nor tokens."""
    at: tuple[int, int] = (-3, -2)
    """Which of the tensor's dimensions are the samples and the tokens."""
    integers: torch.dtype | None = None
    """Of a tensor of integers: its dtype. A state has the bits of each."""
    numbers_each: int = 1
    """Numbers of a state that one of the tensor's takes."""

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape) * self.numbers_each

    def of(self, states: Tensor) -> Tensor:
        """The tensor."""
        part = states[..., self.start : self.stop]
        if self.integers is not None:
            part = part.contiguous().view(_BITS[self.numbers_each * states.element_size()]).to(self.integers)
        return part.reshape(*part.shape[:2], *self.shape).movedim((0, 1), self.at)

    def put(self, states: Tensor, tensor: Tensor) -> None:
        part = tensor.movedim(self.at, (0, 1)).reshape(*states.shape[:2], -1)
        if self.integers is not None:
            part = part.to(_BITS[self.numbers_each * states.element_size()]).view(states.dtype)
        states[..., self.start : self.stop] = part


_BITS = {4: torch.int32, 8: torch.int64}
"""Integers by their bytes."""


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
        self.modules = list(model.get_submodule(layout.blocks))
        """In the list of blocks. Each is a block, but for families of which one holds several."""
        self._sublayers: list[list[Sublayer]] = [[] for _ in self.modules]
        for s in layout.sublayers(len(self.modules) * layout.blocks_each):
            self._sublayers[s.block // layout.blocks_each].append(s)
        self._views: dict[tuple[int, frozenset[Sublayer]], nn.Module] = {}
        self.vocabulary = 0
        """Logits a token, as the head gives them."""
        self._n_outputs: int | None = None
        self._given: list[Given] = []
        self._shared: int | str | None = None
        """Which of a module's arguments later ones find keys and values in."""
        self._handed: dict[str, int] = {}
        """Arguments in which a module is given an output of the one before, and which output."""
        self.width = 0
        """Numbers that a state has of each token."""
        self._stream = self._capture(tokens)
        self._shared_at = self._find_shared()
        self._handed_at = self._find_handed(tokens)
        self._inputs = self._find_inputs(tokens)
        self._rows = self._find_rows(tokens)
        if layout.sequential:
            self.units = [Unit(i, (s,)) for i, of in enumerate(self._sublayers) for s in of]
        else:
            self.units = [Unit(i, tuple(of)) for i, of in enumerate(self._sublayers)]

    @property
    def widest(self) -> int:
        """The most numbers that a token has between two of the blocks' matrices. Configs have no name for it that all
        families share."""
        matrices = (p for module in self.modules for p in module.parameters() if p.dim() > 1)
        return max((max(p.shape[-2:]) for p in matrices), default=self.width)

    def view(self, module: int, without: frozenset[Sublayer]) -> nn.Module:
        """A module with some sublayers bypassed; shares its weights."""
        key = (module, without)
        if key not in self._views:
            branches = {s: self.layout.branch(s.kind, s.block) for s in sorted(without)}
            view = _shallow(self.modules[module], *(name for branch in branches.values() for name in branch.members))
            for s in branches:
                bypass(view, s.kind, branch_of(self._layout, s.kind, s.block))
            self._views[key] = view
        return self._views[key]

    def stream(self, states: Tensor) -> Tensor:
        """The residual stream in states, (..., numbers), without what they carry."""
        return states[..., : self._stream.stop]

    def module(self, unit: Unit, removed: Iterable[Sublayer]) -> nn.Module | None:
        """What runs for a unit: its module, reduced to the unit's kept sublayers. None where none of them runs."""
        gone = frozenset(removed).intersection(self._sublayers[unit.module])
        if self.layout.sequential:
            if gone.issuperset(unit.sublayers):
                return None
            gone = frozenset(self._sublayers[unit.module]).difference(unit.sublayers)
        return self.view(unit.module, gone)

    def run(self, unit: Unit, states: Tensor, removed: Iterable[Sublayer]) -> Tensor:
        """One unit on (batch, tokens, hidden) states; `removed` may name sublayers of other units too."""
        view = self.module(unit, removed)
        if view is None:
            return states
        given = self._given[unit.module]
        if len(states) > 1:
            given = given | {key: _for_samples(given[key], len(states)) for key in self._rows[unit.module]}
        if not self.carries:
            return _states(_call(view, states, given))
        given = given | {key: place.of(states) for key, place in self._inputs.get(unit.module, {}).items()}
        given |= {key: place.of(states) for key, place in self._handed_at.items() if given[key] is not None}
        before = {key: tuple(place.of(states) for place in places) for key, places in self._shared_at.items()}
        if before:
            given[self._shared] = dict(before)
        after = states.clone()
        output = _call(view, self._stream.of(states), given)
        self._stream.put(after, _states(output))
        for key, place in self._handed_at.items():
            if output[self._handed[key]] is not None:
                place.put(after, output[self._handed[key]])
        for key, places in self._shared_at.items():
            if (now := given[self._shared][key]) is not before[key]:
                for place, tensor in zip(places, now, strict=True):
                    place.put(after, tensor)
        return after

    @property
    def carries(self) -> bool:
        """Whether states have more than the residual stream: what blocks are given or share beside it."""
        return bool(self._shared_at or self._handed_at or self._inputs or len(self._stream.shape) > 1)

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) ids -> (batch, tokens, hidden): the first block's input."""
        if not self.carries:
            catch = _StandIn(self.modules[0], self._n_outputs)
            self._run(self._around([catch]), tokens)
            return catch.states
        catches = self._stand_ins(tokens)
        first = catches[0].states
        states = first.new_zeros(*tokens.shape, self.width)
        self._stream.put(states, first)
        for module, inputs in self._inputs.items():
            for key, place in inputs.items():
                place.put(states, catches[module].given[key])
        return states

    def logits(self, states: Tensor) -> Tensor:
        """(batch, tokens, hidden) after the last block -> (batch, tokens, vocab), all by the model's own code."""
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        if self.carries:
            states = self._stream.of(states)
        return self._run(self._around([_StandIn(self.modules[0], self._n_outputs, states)]), ids).logits

    def _run(self, model: nn.Module, tokens: Tensor) -> Any:
        # Routers' logits are there for a loss only, and a model none of whose routers ran fails at it.
        routers = {"output_router_logits": False} if hasattr(self.model.config, "output_router_logits") else {}
        return model(tokens, use_cache=False, **routers)

    def _around(self, instead: list[nn.Module]) -> nn.Module:
        """The model with these in place of its modules in the list of blocks; shares its weights."""
        model = _shallow(self.model, self.layout.blocks)
        model.set_submodule(self.layout.blocks, nn.ModuleList(instead))
        return model

    def _stand_ins(self, tokens: Tensor) -> list[_StandIn]:
        """What the model gives every module, the same stream to each."""
        catches = [_StandIn(module, self._n_outputs) for module in self.modules]
        self._run(self._around(catches), tokens)
        return catches

    def _capture(self, tokens: Tensor) -> _Place:
        """Run the model, and keep what it gives each block besides the stream: masks, position embeddings.

        Returns:
            where a state has the stream.

        Raises:
            ValueError: the stream is not (..., samples, tokens, hidden).
        """
        first: Tensor | None = None
        last: tuple[Any, ...] = ()

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal first, last
            if first is None:
                first = args[0] if args else kwargs["hidden_states"]
            self._given.append(_given(args[1:], kwargs))
            beside = [(at, value) for at, value in enumerate(last) if at and torch.is_tensor(value)]
            self._handed |= {name: at for name, given in kwargs.items() for at, value in beside if given is value}
            last = output if isinstance(output, tuple) else ()
            self._n_outputs = len(last) or None

        hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in self.modules]
        try:
            self.vocabulary = self._run(self.model, tokens).logits.shape[-1]
        finally:
            for hook in hooks:
                hook.remove()
        # Several streams lie before the samples (Gemma 3n), or within each token (DeepSeek-V4).
        self._dtype, shape = first.dtype, first.shape
        if shape[:2] == tokens.shape:
            return self._placed(first, (0, 1))
        if shape[-3:-1] != tokens.shape:
            raise ValueError(
                f"cannot search a {self.model.config.model_type} model: for tokens of shape {tuple(tokens.shape)} its "
                f"stream has the shape {tuple(shape)}"
            )
        return self._placed(first)

    def _placed(self, tensor: Tensor, at: tuple[int, int] = (-3, -2)) -> _Place:
        """A place for what comes next in a state.

        Args:
            at: which of the tensor's dimensions are the samples and the tokens.
        """
        shape = tuple(tensor.movedim(at, (0, 1)).shape[2:])
        if tensor.is_floating_point():
            place = _Place(self.width, shape, at)
        else:
            place = _Place(self.width, shape, at, tensor.dtype, max(1, 4 // self._dtype.itemsize))
        self.width = place.stop
        return place

    def _find_shared(self) -> dict[Any, tuple[_Place, ...]]:
        """Where a state has keys and values that later blocks read: (samples, heads, tokens, numbers) each. Attentions
        put them into a mapping that all blocks are given."""
        for key, value in self._given[0].items():
            if _has_keys_and_values(value):
                self._shared = key
                return {
                    name: tuple(self._placed(tensor, (0, 2)) for tensor in tensors) for name, tensors in value.items()
                }
        return {}

    def _find_handed(self, tokens: Tensor) -> dict[str, _Place]:
        """Where a state has what a block hands on to the next beside the stream, by its argument.

        Raises:
            ValueError: that does not lie token by token.
        """
        found = {}
        for key in self._handed:
            value = next(value for given in self._given if (value := given[key]) is not None)
            if value.shape[:2] != tokens.shape:
                raise ValueError(self._not_by_token(key))
            found[key] = self._placed(value, (0, 1))
        return found

    def _find_inputs(self, tokens: Tensor) -> dict[int, dict[int | str, _Place]]:
        """Where a state has what else depends on the tokens that a module is given, by the module and its argument.

        Raises:
            ValueError: that is not a number or a vector for each token.
        """
        found: dict[int, dict[int | str, _Place]] = {}
        placed: dict[int, _Place] = {}
        others = self._stand_ins((tokens + 1) % self.vocabulary)
        for module, (given, other) in enumerate(zip(self._given, others, strict=True)):
            for key, value in given.items():
                if key == self._shared or key in self._handed or _same(value, other.given.get(key)):
                    continue
                if not (torch.is_tensor(value) and value.dim() <= 3 and value.shape[:2] == tokens.shape):
                    raise ValueError(self._not_by_token(key))
                # One tensor may be given to all.
                if id(value) not in placed:
                    placed[id(value)] = self._placed(value, (0, 1))
                found.setdefault(module, {})[key] = placed[id(value)]
        return found

    def _not_by_token(self, key: int | str) -> str:
        return (
            f"cannot search a {self.model.config.model_type} model: its blocks are given something that depends on the "
            f"tokens beside the stream, and is not a number or a vector for each ({key})"
        )

    def _find_rows(self, tokens: Tensor) -> list[list[int | str]]:
        """By the module its arguments that have rows of each sample, as a mask has one and ALiBi one for each head: a
        batch has to be given as many."""
        of_two = self._stand_ins(tokens.repeat(2, 1))
        return [
            [key for key, value in given.items() if _has_rows(value, two.given.get(key))]
            for given, two in zip(self._given, of_two, strict=True)
        ]


def _has_rows(one: Any, two: Any) -> bool:
    """Whether a tensor that blocks are given for two samples has twice the rows of that for one."""
    return torch.is_tensor(one) and one.dim() > 0 and two is not None and len(two) == 2 * len(one)


def _for_samples(rows: Tensor, n_samples: int) -> Tensor:
    """Those of one sample for each of some."""
    return rows[None].expand(n_samples, *rows.shape).flatten(0, 1)


def _has_keys_and_values(value: Any) -> bool:
    """Whether a block was given a mapping of those of attentions; position embeddings come in mappings too."""
    return (
        isinstance(value, MutableMapping)
        and bool(value)
        and all(isinstance(pair, tuple) and all(tensor.dim() == 4 for tensor in pair) for pair in value.values())
    )


def _given(args: tuple, kwargs: dict[str, Any]) -> Given:
    return {**dict(enumerate(args)), **{name: value for name, value in kwargs.items() if name != "hidden_states"}}


def _call(block: nn.Module, states: Tensor, given: Given) -> Any:
    args = [value for key, value in given.items() if isinstance(key, int)]
    return block(states, *args, **{key: value for key, value in given.items() if isinstance(key, str)})


def _same(one: Any, other: Any) -> bool:
    """Whether all tensors in two arguments are."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and all(map(_same, one, other))
    return True


def _states(output: Any) -> Tensor:
    """A block's output states: in some families the first of several outputs."""
    return output[0] if isinstance(output, tuple) else output


def _shallow(module: nn.Module, *paths: str) -> nn.Module:
    """Another module with the same parameters and children, whose children can be replaced, and the modules at some
    paths as well."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    inside = {}
    for path in paths:
        child, _, rest = path.partition(".")
        if rest:
            inside.setdefault(child, []).append(rest)
    for child, rests in inside.items():
        copied._modules[child] = _shallow(copied._modules[child], *rests)
    if hasattr(module, "_hf_hook"):
        # accelerate, which spreads a model over devices, puts a forward on the instance that is bound to it.
        copied._old_forward = MethodType(module._old_forward.__func__, copied)
        copied.forward = partial(module.forward.func, copied)
    return copied


class _StandIn(nn.Module):
    """Stands in for a block, or for all: records what it is given, and returns `states` if it has any."""

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
        self.given: Given = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.given = _given(args, kwargs)
        if self.states is None:
            self.states = hidden_states
        return self.states if self.n_outputs is None else (self.states, *[None] * (self.n_outputs - 1))
