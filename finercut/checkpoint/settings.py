"""Sections `prune`, `heal`, `quantise` and `prove` of params.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from finercut.healing.settings import Distill, NotNegative, Reconstruct, Refit, Unhealed
from finercut.selection.settings import Budget
from finercut.system.settings import Section


class Prune(Section):
    budget: Budget


Heal = Annotated[Unhealed | Refit | Reconstruct | Distill, Field(discriminator="method")]
"""How the pruned checkpoint is repaired."""


class Unquantised(Section):
    method: Literal["none"]
    """Keep the weights in the dtype they have."""


def _pattern(text: str) -> str:
    try:
        re.compile(text.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
    return text


class Quantised(Section):
    """Store the blocks' matrices in fewer bits, by llm-compressor; `make setup QUANTISE=1` installs it."""

    method: Literal["rtn", "gptq"]
    """rtn: every weight to the nearest number. gptq: the columns of a matrix one after another, each making up for what
    rounding the earlier ones changed on calibration windows."""
    scheme: Literal["w8a8", "w7a8", "fp8", "w4a16"]
    """w8a8: 8-bit integers, one scale a row; inputs too, one scale a token. w7a8: the same with weights of half the
    range, for CPUs without VNNI, on which vLLM's sums of w8a8 overflow. fp8: 8-bit floating point. w4a16: weights in
    4-bit integers with a scale for each group, inputs as they are."""
    group_size: PositiveInt | None
    """Columns that share a scale, with w4a16 only; must divide the columns of every matrix. null: a whole row."""
    ignore: list[Annotated[str, AfterValidator(_pattern)]]
    """Modules that stay as they are, by name or, after `re:`, regular expression. Embeddings always stay."""
    n_samples: PositiveInt
    """Windows that gptq looks at: those for calibration, then those for healing."""
    max_divergence_rise: NotNegative
    """Most that the held-out divergence from the whole model may rise by, js, nats per token."""
    device: str
    """auto, cpu, cuda, cuda:1, ..."""

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.group_size is not None and self.scheme != "w4a16":
            raise ValueError(f"group_size is for w4a16; {self.scheme} has one scale a row: write null")
        return self


Quantise = Annotated[Unquantised | Quantised, Field(discriminator="method")]
"""How the healed checkpoint's weights are stored."""


class Prove(Section):
    """How far numbers may differ for a claim to hold. They are compared in float32, but for what vLLM computes with
    quantised weights in half precision."""

    logit_tolerance: PositiveFloat
    """Between a checkpoint and the model that its step says it equals: largest difference of two logits."""
    log_probability_tolerance: PositiveFloat
    """Between vLLM and transformers: largest difference of two log-probabilities, nats."""
    quantised_tolerance: PositiveFloat = 0.5
    """The same where weights alone are quantised, which vLLM multiplies in bfloat16. Where inputs are too, the mean
    difference is held to what rounding makes of transformers' own log-probabilities."""
    device: str
    """Of transformers: auto, cpu, cuda, cuda:1, ..."""
    weights_gib: PositiveFloat | None = None
    """Of that device's memory, for a model's float32 weights. Where they need more, sublayers are brought when they
    run; null: all are there."""
    tensor_parallel_size: PositiveInt = 1
    """Of vLLM's engines, as in throughput."""
    pipeline_parallel_size: PositiveInt = 1
    """Of vLLM's engines, as in throughput."""
