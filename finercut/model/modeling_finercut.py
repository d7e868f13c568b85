"""Models with sublayers removed, on top of transformers' own classes.

`FinerCut<Base>` exists here for every language model `<Base>` of transformers, and is made when it is asked for:
`FinerCutLlamaForCausalLM` is `LlamaForCausalLM` less the sublayers that its config lists as skipped. Where the language
model lies inside another with vision or audio around it, its part of the config lists them, and the rest is as it was:
`FinerCutLlavaForConditionalGeneration`.

This file is copied into every pruned checkpoint, so that `trust_remote_code=True` loads it where finercut is not
installed. It therefore imports nothing of finercut.
"""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

PREFIX = "FinerCut"
INNER = "Inner"
KINDS = ("attention", "mlp")
WITHOUT_LENGTH = ("linear_attention", "conv", "moe", "mlp")
"""Types of blocks, as transformers names them, whose layer of a cache does not know how many tokens went by."""


class Removed(nn.Module):
    """Stands where the core of a sublayer was, and adds nothing to the residual stream.

    Args:
        n_outputs: of the core; the first is what it adds.
        stream: the core's argument that is the stream, where the core adds to it by itself.
        hands_on: which output is for the next block, and the argument that the block before gave as such.
    """

    def __init__(
        self,
        kind: str,
        n_outputs: int,
        stream: int | str | None = None,
        hands_on: tuple[int, str] | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.n_outputs = n_outputs
        self.stream = stream
        self.hands_on = hands_on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.stream is not None:
            left = argument(args, kwargs, self.stream)
        else:
            # Families name and order a core's arguments differently.
            states = next(x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.is_floating_point())
            # Of full shape: some families add to it in place, or reshape it.
            left = torch.zeros_like(states)
        if self.n_outputs == 1:
            return left
        outputs = [left, *[None] * (self.n_outputs - 1)]
        if self.hands_on is not None:
            position, name = self.hands_on
            outputs[position] = kwargs[name]
        return tuple(outputs)

    def extra_repr(self) -> str:
        return self.kind


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], key: int | str) -> Any:
    """One of a call's arguments, by its position or its name."""
    return args[key] if isinstance(key, int) else kwargs[key]


def branch_of(layout: dict[str, Any], kind: str, block: int) -> dict[str, Any] | None:
    """Where a block keeps its sublayer of that kind; None if it has none.

    Args:
        layout: where the family keeps its sublayers, as `finercut.model.families.Layout` writes it.
    """
    # Checkpoints of 0.1.0 say nothing of variants.
    return next((v for v in layout.get("variants", ()) if block in v["at"]), layout)[kind]


def holders(modules: Sequence[nn.Module], layout: dict[str, Any]) -> list[nn.Module]:
    """The module that holds each block, by the block's number: some hold several.

    Args:
        modules: those in the list of blocks.
    """
    n_each = layout.get("blocks_each", 1)
    return [module for module in modules for _ in range(n_each)]


def bypass(block: nn.Module, kind: str, branch: dict[str, Any] | None) -> dict[str, nn.Module]:
    """Take one sublayer out of the path through `block`.

    Args:
        branch: the sublayer, of `branch_of`.

    Returns:
        The modules that were replaced, by name: putting them back undoes it.
    """
    replaced: dict[str, nn.Module] = {}
    for path in (branch, *branch.get("beside", ())) if branch else ():
        # Attentions of transformers return their weights too. Checkpoints of 0.1.0 do not say so.
        n_outputs = path.get("n_outputs") or (2 if kind == "attention" else 1)
        members = {name: nn.Identity() for name in (*path["before"], *path["after"])}
        core = Removed(kind, n_outputs, path.get("stream"), path.get("hands_on"))
        # Models set what is not stored when they are loaded, in every block.
        whole = block.get_submodule(path["core"])
        for name in whole._non_persistent_buffers_set:
            core.register_buffer(name, whole.get_buffer(name), persistent=False)
        for name, instead in (members | {path["core"]: core}).items():
            replaced[name] = block.get_submodule(name)
            block.set_submodule(name, instead)
    return replaced


def removed_sublayers(config: transformers.PreTrainedConfig) -> list[tuple[int, str]]:
    """(block, kind) of every sublayer the config, or its language model's part, lists as skipped, by depth."""
    language = config.get_text_config()
    if not language.is_heterogeneous:
        return []
    blocks = language.per_layer_config
    return [(i, kind) for i in range(len(blocks)) for kind in KINDS if kind in getattr(blocks[i], "skip", ())]


def own_settings(config: transformers.PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """What `per_layer_config` says of blocks beside skips, where they differ in the whole model too."""
    blocks = config.to_dict().get("per_layer_config", {}) if config.is_heterogeneous else {}
    found = {int(i): {name: value for name, value in of.items() if name != "skip"} for i, of in blocks.items()}
    return {i: of for i, of in found.items() if of}


def readers(config: transformers.PreTrainedConfig) -> dict[int, int]:
    """Blocks whose attention has no keys and values of its own, each with the block whose it reads: the last one of its
    type that has them, as transformers defines `num_kv_shared_layers`."""
    n_blocks = config.num_hidden_layers
    first = n_blocks - (getattr(config, "num_kv_shared_layers", None) or 0)
    if not 0 < first < n_blocks:
        return {}
    types = config.layer_types
    return {i: max(j for j in range(first) if types[j] == types[i]) for i in range(first, n_blocks)}


def followers(config: transformers.PreTrainedConfig) -> dict[int, int]:
    """Blocks whose attention looks at the tokens that the attention of another block chose, each with that block, as
    transformers defines `indexer_types`."""
    types = getattr(config, "indexer_types", None) or []
    choosing = [i for i, of in enumerate(types) if of != "shared"]
    return {i: max(j for j in choosing if j < i) for i, of in enumerate(types) if of == "shared"}


def kept_attentions(config: transformers.PreTrainedConfig) -> list[int]:
    """Blocks that still have their attention and whose attention has a cache, in the order of its layers."""
    gone = {block for block, kind in removed_sublayers(config) if kind == "attention"}
    gone.update(readers(config))
    layout = (config.finercut or {}).get("layout")
    blocks = range(config.num_hidden_layers)
    return numbered(
        config, [i for i in blocks if i not in gone and (layout is None or branch_of(layout, "attention", i))]
    )


def numbered(config: transformers.PreTrainedConfig, blocks: list[int]) -> list[int]:
    """Some blocks in the order of their layers of a cache. Some caches tell their length by the first one: those that
    know how many tokens went by come first."""
    known = counting(config, blocks)
    return known + [i for i in blocks if i not in known]


def counting(config: transformers.PreTrainedConfig, blocks: list[int]) -> list[int]:
    """Of some blocks those whose cache knows how many tokens went by: keys and values do, recurrent states do not."""
    types, without = getattr(config, "layer_types", None), readers(config)
    return [i for i in blocks if i not in without and (types is None or types[i] not in WITHOUT_LENGTH)]


def cached_by(attention: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules of an attention that know its layer of the KV cache, mostly itself, sometimes one inside, and the
    attribute of each that says it."""
    names = ("layer_idx", "layer_id")
    return [(m, name) for m in attention.modules() for name in names if isinstance(getattr(m, name, None), int)]


def remove_sublayers(model: nn.Module) -> None:
    """Take out of `model` what its config lists as skipped.

    Kept attentions are numbered anew: every layer of a cache must be one that is filled.

    Raises:
        ValueError: the config does not say where the sublayers are, or no attention is left.
    """
    config = model.config.get_text_config()
    removed = removed_sublayers(config)
    if not removed:
        return
    layout = (config.finercut or {}).get("layout")
    if layout is None:
        raise ValueError(f"{type(config).__name__} skips sublayers but has no finercut.layout to find them by")
    kept = kept_attentions(config)
    if not kept:
        raise ValueError("every attention is removed; a model without one cannot tell positions apart")
    if counting(config, list(range(config.num_hidden_layers))) and not counting(config, kept):
        raise ValueError("every attention with keys and values is removed; the cache cannot count tokens without one")
    for what, needed in (("keys and values", readers(config)), ("choice of tokens", followers(config))):
        for reader, read in needed.items():
            if (read, "attention") in removed and (reader, "attention") not in removed:
                raise ValueError(f"the attention of block {read} is removed, whose {what} that of {reader} reads")
    # The same blocks for a model with and without its head.
    blocks = model.base_model.get_submodule(layout["blocks"].removeprefix(f"{model.base_model_prefix}."))
    holding = holders(blocks, layout)
    for index, kind in removed:
        bypass(holding[index], kind, branch_of(layout, kind, index))
    renumber(blocks, config, layout, {index: position for position, index in enumerate(kept)})


def renumber(blocks: Sequence[nn.Module], config: Any, layout: dict[str, Any], positions: Mapping[int, int]) -> None:
    """Give attentions other layers of the cache.

    Args:
        positions: the layer by the block.
    """
    read = readers(config)
    for index, block in enumerate(holders(blocks, layout)):
        attention = branch_of(layout, "attention", index)
        for path in (attention, *attention.get("beside", ())) if attention else ():
            for module, name in cached_by(block.get_submodule(path["core"])):
                setattr(module, name, positions.get(index, getattr(module, name)))
                # Gemma 3n keeps keys and values that others read by the number of the attention.
                if index in read and hasattr(module, "kv_shared_layer_index"):
                    module.kv_shared_layer_index = positions[read[index]]


@functools.cache
def _plain(config_class: type) -> type:
    """The same config with attributes of its own where the class computes them: some derive the types of blocks."""
    renamed = {k: v for k, v in config_class.attribute_map.items() if k not in ("layer_types", "num_hidden_layers")}
    body = {"attribute_map": renamed, "layer_types": None, "num_hidden_layers": 0, "__module__": __name__}
    return type(config_class.__name__, (config_class,), body)


def cache_config(config: Any, kept: list[int]) -> Any:
    """The config of a cache that has a layer for each attention of the blocks `kept`, and none else."""
    cached = copy.copy(config)
    own = own_settings(config)
    cached.per_layer_config = None
    types = getattr(config, "layer_types", None)
    cached.__class__ = _plain(type(config))
    cached.num_hidden_layers = len(kept)
    cached.layer_types = None if types is None else [types[block] for block in kept]
    if hasattr(config, "num_kv_shared_layers"):
        cached.num_kv_shared_layers = 0
    if own:
        cached.per_layer_config = {position: own.get(block, {}) for position, block in enumerate(kept)}
    return cached


class _PerLayer(Sequence):
    """A config's `per_layer_config`, of which a type of block may be asked for although some of it skip sublayers."""

    def __init__(self, of: Sequence, types: list[str] | None) -> None:
        self._of, self._types = of, types

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, key: Any) -> Any:
        return self._of[self._types.index(key) if isinstance(key, str) else key]


class PrunedConfig:
    """What a pruned model's config adds to its base's: a cache sees the kept attentions only."""

    def __post_init__(self, **settings: Any) -> None:
        super().__post_init__(**settings)
        inner = self.get_text_config()
        if inner is not self:
            inner.__class__ = inner_config_class(type(inner))
            inner.finercut = self.finercut

    @property
    def per_layer_config(self) -> Sequence:
        return _PerLayer(super().per_layer_config, getattr(self, "layer_types", None))

    @per_layer_config.setter
    def per_layer_config(self, settings: dict[Any, dict[str, Any]] | None) -> None:
        super(PrunedConfig, type(self)).per_layer_config.fset(self, settings)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        config = super().get_text_config(decoder=decoder, encoder=encoder)
        # Transformers asks with decoder=True where it builds caches and reads generation defaults.
        if not decoder or not removed_sublayers(config):
            return config
        return cache_config(config, kept_attentions(config))

    def to_diff_dict(self) -> dict[str, Any]:
        """As transformers', and the number of blocks by its common name: where no finercut is installed, transformers
        reads the tokenizer with a bare `PreTrainedConfig`, which checks `per_layer_config` against that name."""
        settings = super().to_diff_dict()
        return settings | {"num_hidden_layers": self.num_hidden_layers} if self.is_heterogeneous else settings


class InnerConfig(PrunedConfig):
    """What is added to the config of a language model inside another. It stays of its type: models are made by that."""

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without the origin, which the config around it stores."""
        return {name: value for name, value in super().to_dict().items() if name != "finercut"}


class PrunedModel:
    """What a pruned model adds to its base: it builds kept sublayers only, and refuses weights that do not fit."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        remove_sublayers(self)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether transformers' code is not what initialises it: that of the whole model decides. Transformers passes
        over the model itself otherwise, and buffers that it sets in its blocks stay without values."""
        whole = next(
            base for base in cls.__mro__ if not issubclass(base, PrunedModel) and hasattr(base, "is_custom_code")
        )
        return whole.is_custom_code()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but missing, unexpected and misshapen weights are errors, not warnings.

        Raises:
            ValueError: the checkpoint's weights are not the ones its config asks for.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {
            what: sorted(map(str, info[f"{what}_keys"]))
            for what in ("missing", "unexpected", "mismatched")
            if info[f"{what}_keys"]
        }
        if wrong:
            found = "; ".join(f"{what}: {', '.join(keys[:3])} ({len(keys)})" for what, keys in wrong.items())
            raise ValueError(f"weights and config.json do not belong together: {found}")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        here, there = Path(__file__), Path(save_directory) / "modeling_finercut.py"
        if not (there.exists() and there.samefile(here)):
            shutil.copyfile(here, there)
        return saved


def pruned_config_class(base: type, module: str) -> type:
    """`FinerCut<base>`, a class of the module of that name."""
    body = {
        "__module__": module,
        "__annotations__": {"finercut": dict | None},
        "__doc__": f"`{base.__name__}` with the removals listed in `per_layer_config`, their origin in `finercut`.",
        "model_type": f"finercut_{base.model_type}",
        "finercut": None,
    }
    if not base.__module__.startswith("transformers."):
        # Transformers writes an __init__ for classes without one, which would not call the base's.
        body["__init__"] = lambda self, **settings: base.__init__(self, **settings)
    return type(PREFIX + base.__name__, (PrunedConfig, base), body)


@functools.cache
def inner_config_class(base: type) -> type:
    """`base` of a language model inside another: of the same name, by which transformers finds the model's class."""
    body = {
        "__module__": __name__,
        "__qualname__": f"{PREFIX}{INNER}{base.__name__}",  # which it is pickled by
        "__annotations__": {"finercut": dict | None},
        "finercut": None,
    }
    return type(base.__name__, (InnerConfig, base), body)


def pruned_model_class(base: type, config_class: type, module: str) -> type:
    """`FinerCut<base>`, a class of the module of that name.

    Args:
        config_class: what `pruned_config_class` made of the base's.
    """
    name = PREFIX + base.__name__
    body = {
        "__module__": module,
        "__doc__": f"`{base.__name__}` less the sublayers its config lists as skipped.",
        "config_class": config_class,
    }
    # Where a family's files and modules name weights differently, transformers looks the renaming up by class or type.
    ours = (name, config_class.model_type)
    for key, theirs in zip(ours, (base.__name__, base.config_class.model_type), strict=True):
        if (renaming := get_checkpoint_conversion_mapping(theirs)) is not None:
            register_checkpoint_conversion_mapping(key, renaming, overwrite=True)
    return type(name, (PrunedModel, base), body)


def _class(name: str) -> type:
    """The class of that name, made once: transformers compares config classes by identity."""
    if name not in globals():
        base = getattr(transformers, name.removeprefix(PREFIX))
        if name.endswith("Config"):
            globals()[name] = pruned_config_class(base, __name__)
        else:
            config_class = _class(PREFIX + base.config_class.__name__)
            globals()[name] = pruned_model_class(base, config_class, __name__)
    return globals()[name]


def __getattr__(name: str) -> Any:
    if name.startswith(PREFIX + INNER):
        return inner_config_class(getattr(transformers, name.removeprefix(PREFIX + INNER)))
    if name.startswith(PREFIX) and hasattr(transformers, name.removeprefix(PREFIX)):
        return _class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
