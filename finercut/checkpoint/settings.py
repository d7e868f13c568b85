"""Sections `prune`, `heal` and `prove` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from finercut.healing.settings import Distill, Reconstruct, Refit, Unhealed
from finercut.selection.settings import Budget
from finercut.system.settings import Section


class Prune(Section):
    budget: Budget


Heal = Annotated[Unhealed | Refit | Reconstruct | Distill, Field(discriminator="method")]
"""How the pruned checkpoint is repaired."""


class Prove(Section):
    """How far numbers may differ for a claim to hold. All are compared in float32."""

    logit_tolerance: PositiveFloat
    """Between a checkpoint and the model that its step says it equals: largest difference of two logits."""
    log_probability_tolerance: PositiveFloat
    """Between vLLM and transformers: largest difference of two log-probabilities, nats."""
    device: str
    """Of transformers: auto, cpu, cuda, cuda:1, ..."""
    weights_gib: PositiveFloat | None = None
    """Of that device's memory, for a model's float32 weights. Where they need more, sublayers are brought when they
    run; null: all are there."""
    tensor_parallel_size: PositiveInt = 1
    """Of vLLM's engines, as in throughput."""
    pipeline_parallel_size: PositiveInt = 1
    """Of vLLM's engines, as in throughput."""
