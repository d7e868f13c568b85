"""Where each family of decoder keeps its sublayers. Adding a family is one entry here.

A sublayer is a core module, whose output is added to the residual stream, and what runs just before and after it for
its sake alone (norms). Members are named as attributes of the block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Branch:
    """One sublayer of a block: `before` -> `core` -> `after`, in the order they run."""

    core: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        return (*self.before, self.core, *self.after)


@dataclass(frozen=True)
class Layout:
    """Where the blocks are in the model, and the sublayers in a block. Travels in a pruned checkpoint's config."""

    blocks: str
    attention: Branch
    mlp: Branch
    sequential: bool = True
    """A block is its attention followed by its MLP. Otherwise, where both read the same stream or a norm lies on the
    stream itself, a block is run as one."""

    def branch(self, kind: str) -> Branch:
        return self.attention if kind == "attention" else self.mlp

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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


# By the whole model's `model_type`: the layout, or what makes it from the config where that decides.
FAMILIES: dict[str, Layout | Callable[[Any], Layout]] = {
    "gemma2": SANDWICH_NORM,
    "gemma3_text": SANDWICH_NORM,
    "gpt2": Layout("transformer.h", Branch("attn", before=("ln_1",)), Branch("mlp", before=("ln_2",))),
    "gpt_neox": _gpt_neox,
    "granite": PRE_NORM,
    "llama": PRE_NORM,
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
        ValueError: a family that is not declared here.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"cannot prune a {config.model_type} model; known families: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[config.model_type]
    return family if isinstance(family, Layout) else family(config)


def base_architecture(model_type: str) -> str:
    """Name of transformers' causal language model class of a family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def register_configs() -> None:
    """Make transformers' `AutoConfig` know the pruned families. May be called again.

    Names only, as transformers keeps its own: the classes cannot be made while transformers is still being imported.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from finercut import modeling_finercut

    for model_type in FAMILIES:
        CONFIG_MAPPING_NAMES[f"finercut_{model_type}"] = modeling_finercut.PREFIX + CONFIG_MAPPING_NAMES[model_type]
        # Where transformers looks for the classes of a model type.
        sys.modules[f"transformers.models.finercut_{model_type}"] = modeling_finercut


def register_models() -> None:
    """Make transformers' `AutoModelForCausalLM` know the pruned families, by name too. May be called again."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from finercut.modeling_finercut import PREFIX

    for model_type in FAMILIES:
        pruned = f"finercut_{model_type}"
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[pruned] = PREFIX + base_architecture(model_type)
        # Made from the configs' names when that module was imported, which may have been before ours were among them.
        MODEL_FOR_CAUSAL_LM_MAPPING._reverse_config_mapping[CONFIG_MAPPING_NAMES[pruned]] = pruned
