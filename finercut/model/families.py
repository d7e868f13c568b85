"""Declares where each decoder family keeps its sublayers. A new family is one entry here.

A sublayer consists of a core module, whose output is added to the residual stream, and the modules that run before and
after it for that core alone (norms). Whatever mixes tokens is an attention: also a linear attention, a state space
model, a short convolution. Members are named by their paths in the block.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from finercut.model.configs import QUANTISATION
from finercut.sublayers import KINDS, Sublayer

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Branch:
    """One sublayer of a block: `before` -> `core` -> `after`, in the order they run."""

    core: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    n_outputs: int | None = None
    """Values that the core returns; the first is added to the stream. None: 2 for an attention, 1 for an MLP."""
    stream: int | str | None = None
    """Argument of the core, by position or name, that is the stream: such a core adds to it by itself."""
    hands_on: tuple[int, str] | None = None
    """Which output of the core the next block is given, by its position, and the argument in which it is: a core that
    is gone hands on what it was given."""
    beside: tuple[Branch, ...] = ()
    """Cores of the same sublayer that run in parallel to this one: a state space model beside an attention, a shared
    expert beside the routed ones."""

    @property
    def paths(self) -> tuple[Branch, ...]:
        return (self, *self.beside)

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(name for path in self.paths for name in (*path.before, path.core, *path.after))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Branch:
        tuples: dict[str, Any] = {name: tuple(values.get(name, ())) for name in ("before", "after")}
        if handed := values.get("hands_on"):
            tuples["hands_on"] = tuple(handed)
        return cls(**values | tuples | {"beside": tuple(map(cls.from_dict, values.get("beside", ())))})


@dataclass(frozen=True)
class Variant:
    """Blocks whose sublayers lie elsewhere than in most, or that lack one."""

    at: tuple[int, ...]
    """Blocks, counted from 0."""
    attention: Branch | None
    mlp: Branch | None


@dataclass(frozen=True)
class Layout:
    """Where the blocks are in the model, and the sublayers in a block. Stored in a pruned checkpoint's config."""

    blocks: str
    attention: Branch | None
    mlp: Branch | None
    sequential: bool = True
    """A block is its attention followed by its MLP. False where both read the same stream, or a norm lies on the stream
    itself: such a block runs as one unit."""
    variants: tuple[Variant, ...] = ()
    """The blocks that `attention` and `mlp` do not hold for."""
    blocks_each: int = 1
    """Blocks, as the config counts them, that each module of the list holds. Several are not sequential."""

    def holders(self, model: nn.Module) -> list[nn.Module]:
        """The module that holds each block, by the block's number."""
        from finercut.model.modeling_finercut import holders

        return holders(model.get_submodule(self.blocks), self.to_dict())

    def branch(self, kind: str, block: int) -> Branch | None:
        """A sublayer of a block; None where the block has none of that kind."""
        of = next((variant for variant in self.variants if block in variant.at), self)
        return of.attention if kind == "attention" else of.mlp

    def sublayers(self, n_blocks: int) -> list[Sublayer]:
        """Those that the blocks have, by depth."""
        return [Sublayer(i, kind) for i in range(n_blocks) for kind in KINDS if self.branch(kind, i)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """
        Raises:
            ValueError: it is not what `to_dict` writes.
        """

        def branches(of: dict[str, Any]) -> dict[str, Branch | None]:
            return {kind: Branch.from_dict(of[kind]) if of[kind] else None for kind in KINDS}

        try:
            variants = tuple(Variant(tuple(v["at"]), **branches(v)) for v in values.get("variants", ()))
            return cls(**values | branches(values) | {"variants": variants})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{LAYOUT_KEY} in config.json is not a layout: {error}. Write it as {EXAMPLE}") from error


LAYOUT_KEY = "finercut_layout"
"""Key of a whole model's config.json: the layout of an undeclared family, found by the probe or written by hand."""
EXAMPLE = json.dumps(
    {
        "blocks": "model.layers",
        "attention": {"core": "self_attn", "before": ["input_layernorm"]},
        "mlp": {"core": "mlp", "before": ["post_attention_layernorm"]},
    }
)

PRE_NORM = Layout(
    blocks="model.layers",
    attention=Branch("self_attn", before=("input_layernorm",)),
    mlp=Branch("mlp", before=("post_attention_layernorm",)),
)
POST_NORM = Layout(
    blocks="model.layers",
    attention=Branch("self_attn", after=("post_attention_layernorm",)),
    mlp=Branch("mlp", after=("post_feedforward_layernorm",)),
)
SANDWICH_NORM = Layout(
    blocks="model.layers",
    attention=Branch("self_attn", before=("input_layernorm",), after=("post_attention_layernorm",)),
    mlp=Branch("mlp", before=("pre_feedforward_layernorm",), after=("post_feedforward_layernorm",)),
)


def _gpt_neox(config: Any) -> Layout:
    return Layout(
        blocks="gpt_neox.layers",
        attention=Branch("attention", before=("input_layernorm",)),
        mlp=Branch("mlp", before=("post_attention_layernorm",)),
        sequential=not config.use_parallel_residual,
    )


def _opt(config: Any) -> Layout:
    # Its MLP is not one module. Where the norms come after the addition (350M), they lie on the stream and stay.
    first = config.do_layer_norm_before
    return Layout(
        blocks="model.decoder.layers",
        attention=Branch("self_attn", before=("self_attn_layer_norm",) if first else ()),
        mlp=Branch("fc2", before=("final_layer_norm", "fc1") if first else ("fc1",)),
        sequential=first,
    )


# Per-layer inputs, and what mixes Gemma 3n's four streams, stay in a block whose sublayers are gone.
_GEMMA_3N = Layout(
    blocks="model.layers",
    attention=Branch("self_attn", after=("post_attention_layernorm",)),
    mlp=Branch("mlp", before=("pre_feedforward_layernorm",), after=("post_feedforward_layernorm",)),
    sequential=False,
)


# The stream is scaled at the end of a block.
_GEMMA_4 = replace(SANDWICH_NORM, sequential=False)


def _gemma4(config: Any) -> Layout:
    if not config.enable_moe_block:
        return _GEMMA_4
    # Experts beside a dense MLP; the norm of their sum makes nothing of nothing.
    experts = Branch("experts", before=("pre_feedforward_layernorm_2",), after=("post_feedforward_layernorm_2",))
    dense = Branch("mlp", before=("pre_feedforward_layernorm",), after=("post_feedforward_layernorm_1",))
    return replace(_GEMMA_4, mlp=replace(dense, beside=(experts, Branch("router", n_outputs=3))))


# A module holds two blocks. Experts read the stream where the first one's MLP does, and add to it after the second one.
_LONGCAT = Layout(
    blocks="model.layers",
    attention=Branch("self_attn.0", before=("input_layernorm.0",)),
    mlp=Branch("mlps.0", before=("post_attention_layernorm.0",), beside=(Branch("mlp"),)),
    sequential=False,
    blocks_each=2,
)


def _longcat(config: Any) -> Layout:
    second = Variant(
        tuple(range(1, config.num_hidden_layers, 2)),
        attention=Branch("self_attn.1", before=("input_layernorm.1",)),
        mlp=Branch("mlps.1", before=("post_attention_layernorm.1",)),
    )
    return replace(_LONGCAT, variants=(second,))


_DBRX = Layout(
    blocks="transformer.blocks",
    attention=Branch("norm_attn_norm.attn", before=("norm_attn_norm.norm_1",)),
    mlp=Branch("ffn", before=("norm_attn_norm.norm_2",)),
)


# By the `model_type` of a decoder: the layout, or what makes it from the config where that decides.
FAMILIES: dict[str, Layout | Callable[[Any], Layout]] = {
    "dbrx": _DBRX,
    "gemma2": SANDWICH_NORM,
    "gemma3_text": SANDWICH_NORM,
    "gemma3n_text": _GEMMA_3N,
    "gemma4_text": _gemma4,
    "gemma4_unified_text": _GEMMA_4,
    "gpt2": Layout("transformer.h", Branch("attn", before=("ln_1",)), Branch("mlp", before=("ln_2",))),
    "gpt_neox": _gpt_neox,
    "granite": PRE_NORM,
    "llama": PRE_NORM,
    "longcat_flash": _longcat,
    "mistral": PRE_NORM,
    "mixtral": PRE_NORM,
    "olmo2": POST_NORM,
    "opt": _opt,
    "phi3": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    "qwen3_moe": PRE_NORM,
}


def layout_of(config: Any) -> Layout:
    """The layout of the whole model that `config` describes.

    Raises:
        ValueError: it cannot be pruned, and why; or its family is not declared.
    """
    check_supported(config)
    if found := getattr(config, LAYOUT_KEY, None):
        return Layout.from_dict(found)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"cannot prune a {config.model_type} model whose sublayers nobody looked for: `finercut fetch` does; "
            f"known families: {', '.join(sorted(FAMILIES))}"
        )
    return declared(config)


def declared(config: Any) -> Layout:
    """The layout that `FAMILIES` has of a decoder."""
    family = FAMILIES[config.model_type]
    return family if isinstance(family, Layout) else family(config)


def fixed_sublayers(config: Any) -> dict[Sublayer, str]:
    """Sublayers of the whole model that no search may remove, and why.

    Raises:
        ValueError: as `layout_of`.
    """
    from finercut.model.modeling_finercut import counting, followers, readers

    layout, language = layout_of(config), config.get_text_config()
    n_blocks = language.num_hidden_layers
    here = layout.sublayers(n_blocks)
    fixed = {Sublayer(i, kind): "the block has none" for i in range(n_blocks) for kind in KINDS}
    fixed = {sublayer: why for sublayer, why in fixed.items() if sublayer not in here}
    reading = readers(language)
    for what, needed in (("keys and values are", reading), ("choice of tokens is", followers(language))):
        for read in sorted(set(needed.values())):
            blocks = ", ".join(str(reader) for reader, of in needed.items() if of == read)
            fixed[Sublayer(read, "attention")] = f"its {what} read by the attention of {blocks}"
    attentions = [s.block for s in here if s.kind == "attention" and s.block not in reading]
    lasting = counting(language, attentions)
    if lasting and len(lasting) < len(attentions):
        fixed[Sublayer(lasting[0], "attention")] = "it is the first by whose keys the cache counts tokens"
    return fixed


def is_declared(config: Any) -> bool:
    return hasattr(config, LAYOUT_KEY) or config.model_type in FAMILIES


def check_supported(config: Any, *, dequantised: bool = False) -> None:
    """
    Args:
        dequantised: whether weights that are quantised will be dequantised before they are used.

    Raises:
        ValueError: a model of that kind cannot be pruned; says why, and what to do where there is something.
    """
    kind = f"cannot prune a {config.model_type} model"
    if config.model_type.startswith("finercut_"):
        raise ValueError(f"{kind}: it is pruned already; take the whole model")
    language = config.get_text_config()
    if any(getattr(of, QUANTISATION, None) for of in (config, language)):
        _check_quantised(config, kind, dequantised)
    if config.is_encoder_decoder or language.is_encoder_decoder:
        raise ValueError(f"{kind}: it is an encoder and a decoder, and only decoders are searched")
    if language is not config:
        if config.model_type not in auto_class(config)._model_mapping._model_mapping:
            raise ValueError(
                f"{kind}: it is a language model ({language.model_type}) with other inputs around it, and transformers "
                "has no class of it that writes text"
            )
        base_architecture(config)
    if language.is_heterogeneous and not type(language)().is_heterogeneous:
        raise ValueError(f"{kind} with a per_layer_config of its own: transformers' code of that type does not read it")


def _check_quantised(config: Any, kind: str, dequantised: bool) -> None:
    from finercut.model.quantised import check_dequantisable, method_of

    refused = f"{kind} that is quantised ({method_of(config)}): take the model it was made from"
    try:
        check_dequantisable(config)
    except ValueError as error:
        raise ValueError(f"{refused}, and quantise after pruning; {error}") from error
    if not dequantised:
        raise ValueError(f"{refused}, or write dequantise: true into fetch.source to have its weights as bfloat16")


def auto_class(config: Any) -> Any:
    """Transformers' Auto class that loads a model as a whole, with what lies around its language model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    # Of some models inside others transformers has a causal class that leaves the others out.
    plain = [AutoModelForCausalLM] if config.get_text_config() is config else []
    candidates = (*plain, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    return next((c for c in candidates if config.model_type in c._model_mapping._model_mapping), AutoModelForCausalLM)


def base_architecture(config: Any) -> str:
    """Name of transformers' class of a whole model that writes text.

    Raises:
        ValueError: transformers has none, the model's code is its own; or it has that of another type.
    """
    import transformers

    name = auto_class(config)._model_mapping._model_mapping.get(config.model_type)
    if name is None:
        raise ValueError(
            f"cannot write a pruned {config.model_type} model: its code is not transformers', a checkpoint would have "
            "to carry it and vLLM has no model of it; it can be searched, and run with sublayers masked"
        )
    of = getattr(transformers, name).config_class
    if not isinstance(config, of):
        raise ValueError(f"cannot prune a {config.model_type} model: its class in transformers is {of.model_type}'s")
    return name
