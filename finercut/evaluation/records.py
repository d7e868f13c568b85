"""What a model scored."""

from __future__ import annotations

from finercut.system.records import Record


class Score(Record):
    """What one model scored in one task."""

    value: float
    stderr: float | None
    n_samples: int
    """Documents evaluated."""
    n_available: int
    """Documents the task has; more than n_samples when a limit was set."""
    n_fewshot: int
    higher_is_better: bool


class Measured(Record):
    """One model, measured by itself: what another is compared with later."""

    sha256: str
    """Of its weights."""
    dtype: str
    perplexity: float
    """On the held-out tokens."""
    bits_per_byte: float
    held_out_sha256: str
    tasks: dict[str, Score]
    lm_eval_version: str
    transformers_version: str
    torch_version: str


class TaskResult(Record):
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


class EvaluateReport(Record):
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
    transformers_version: str | None = None
    torch_version: str | None = None
