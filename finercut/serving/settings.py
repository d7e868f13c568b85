"""Section `throughput` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from finercut.system.settings import Dtype, Section


class EngineSettings(Section):
    """How a vLLM engine is started."""

    concurrency: PositiveInt
    """Requests in flight."""
    dtype: Dtype
    max_model_len: PositiveInt
    """Tokens."""
    kv_cache_gib: PositiveFloat
    """KV cache given to every engine, on CPU and GPU alike."""
    enforce_eager: bool
    """Without torch.compile and CUDA graphs: starts faster, runs slower."""


class Throughput(EngineSettings):
    input_tokens: PositiveInt
    output_tokens: Annotated[int, Field(ge=2)]
    n_warmups: PositiveInt
    """Untimed rounds."""
    n_rounds: Annotated[int, Field(ge=2)]
    """Timed rounds, each with new random prompts."""
    interleave: bool
    """Both engines at once, a round each in turn, so that whatever else the machine does slows both alike; false for
    models that do not fit beside each other."""

    @model_validator(mode="after")
    def _requests_fit(self) -> Throughput:
        if self.input_tokens + self.output_tokens > self.max_model_len:
            raise ValueError(
                f"input_tokens + output_tokens = {self.input_tokens + self.output_tokens} "
                f"do not fit max_model_len = {self.max_model_len}"
            )
        return self
