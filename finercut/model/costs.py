"""What each sublayer of a whole model costs: parameters, KV cache, and the sublayer itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from finercut.model.directory import ModelDirectory
from finercut.model.families import auto_class, layout_of
from finercut.model.modeling_finercut import counting
from finercut.sublayers import KINDS, Sublayer


@dataclass(frozen=True)
class Cost:
    """One column of the table."""

    unit: str
    by_sublayer: Mapping[Sublayer, float]
    whole: float
    """Of the whole model, what is in no sublayer included."""
    error: float | None = None
    """Of what a pruned model is predicted to come to, relative; None where the cost is counted, not measured."""

    def of(self, sublayers: Iterable[Sublayer]) -> float:
        return sum(self.by_sublayer[s] for s in sublayers)

    def share(self, sublayers: Iterable[Sublayer]) -> float:
        """Of the whole model; nothing where that costs nothing, as a recurrent model's cache."""
        return self.of(sublayers) / self.whole if self.whole else 0.0


class Costs(dict[str, Cost]):
    """The table of costs by name. A budget is the name of a cost and an amount; shares are read from the table."""

    def shares(self, removed: Iterable[Sublayer]) -> dict[str, float]:
        """What removing these sublayers saves of each cost, as a share of the whole model; not of predicted ones."""
        gone = list(removed)
        return {name: cost.share(gone) for name, cost in self.items() if cost.error is None}


def costs_of(model: ModelDirectory) -> Costs:
    """The costs of a whole model, without reading its weights.

    Raises:
        ValueError: it cannot be pruned, and why.
    """
    return costs_of_config(model.config, trust_remote_code=model.trusted)


def costs_of_config(config: PreTrainedConfig, trust_remote_code: bool = False) -> Costs:
    """As `costs_of`. Tied embeddings count once.

    Args:
        trust_remote_code: whether the code beside that config may run, for models that need it.
    """
    layout, language = layout_of(config), config.get_text_config()
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    element_bytes = torch.empty(0, dtype=config.dtype or torch.float32).element_size()
    parameters: dict[Sublayer, float] = {}
    kv_bytes: dict[Sublayer, float] = {}
    holders = layout.holders(model)
    for index, block in enumerate(holders):
        for kind in KINDS:
            sublayer, branch = Sublayer(index, kind), layout.branch(kind, index)
            members = [block.get_submodule(name) for name in branch.members] if branch else []
            parameters[sublayer] = sum(p.numel() for m in members for p in m.parameters())
            kv_bytes[sublayer] = 0
            if branch and kind == "attention" and counting(language, [index]):
                paths = [block.get_submodule(path.core) for path in branch.paths]
                kv_bytes[sublayer] = cached_numbers(language.per_layer_config[index], paths) * element_bytes
    there = layout.sublayers(len(holders))
    n_parameters = sum(p.numel() for p in model.parameters())
    return Costs(
        sublayers=Cost("sublayers", {sublayer: int(sublayer in there) for sublayer in parameters}, len(there)),
        parameters=Cost("parameters", parameters, n_parameters),
        kv_cache=Cost("bytes per token", kv_bytes, sum(kv_bytes.values())),
    )


def cached_numbers(config: PreTrainedConfig, paths: Sequence[nn.Module] = ()) -> int:
    """Numbers that an engine keeps of each past token for one attention; a recurrent state does not grow with them.

    Multi-head latent attention keeps one compressed vector and one rotary key; any other the keys and values of its
    heads.

    Args:
        config: of the block, where blocks differ.
        paths: the attention, and what runs beside it, whose sizes count before the config's.
    """
    if latent := getattr(config, "kv_lora_rank", None):
        return latent + config.qk_rope_head_dim
    for path in paths:
        keys, values = (getattr(path, name, None) for name in ("k_proj", "v_proj"))
        if isinstance(keys, nn.Linear) and isinstance(values, nn.Linear):
            return keys.out_features + values.out_features
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * n_kv_heads * head_dim
