"""Runs a model with its cache, whatever the model calls it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def forward(model: PreTrainedModel, tokens: Tensor, cache: Any = None, **options: Any) -> tuple[Any, Any]:
    """One forward after what `cache` holds.

    Args:
        tokens: ids, (samples, tokens)
        cache: of an earlier forward; None before the first
        options: other arguments of the model's forward

    Returns:
        What the model gives, and its cache; None where it has none.
    """
    # State space models of transformers (Mamba) name it so.
    name = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
    output = model(tokens, use_cache=True, **{name: cache}, **options)
    return output, getattr(output, name, None)
