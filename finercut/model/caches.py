"""Runs a model with its cache, whatever the model calls it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def forward(model: PreTrainedModel, tokens: Tensor, cache: Any = None, **options: Any) -> tuple[Any, Any]:
    """One forward after what `cache` holds.

    Args:
        tokens: ids, (samples, tokens)
        cache: of an earlier forward; None before the first
        options: other arguments of the model's forward

    Returns:
        What the model gives, and its cache; None where it has none.
    """
    arguments = inspect.signature(model.forward).parameters
    # State space models of transformers (Mamba) name it so.
    name = "cache_params" if "cache_params" in arguments else "past_key_values"
    if cache is not None and "position_ids" in arguments:
        options = _positions(tokens, cache) | options
    output = model(tokens, use_cache=True, **{name: cache}, **options)
    if getattr(output, name, None) is None and cache is None and "past_key_values" in arguments:
        # Some fill the one they are given and make none (Granite 4 Vision), as `generate` does for them.
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        output = model(tokens, use_cache=True, past_key_values=cache, **options)
    return output, getattr(output, name, None)


def _positions(tokens: Tensor, cache: Any) -> dict[str, Tensor]:
    """Positions of `tokens`, as `generate` gives them, where the cache would tell the model others: MiniMax's tells its
    length by its first layer, which may keep no keys."""
    counting = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "get_seq_length")]
    n_seen = max((layer.get_seq_length() for layer in counting), default=0)
    if n_seen == 0 or n_seen == cache.get_seq_length():
        return {}
    return {"position_ids": torch.arange(n_seen, n_seen + tokens.shape[1], device=tokens.device)[None]}
