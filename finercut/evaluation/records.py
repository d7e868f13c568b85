"""What a model scored."""

from __future__ import annotations

import math

from pydantic import Field

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
    chance: float | None = None
    """What guessing scores; None where the task is no choice among answers."""


class Sample(Record):
    """What one model writes after one prompt, greedily."""

    prompt: str
    text: str
    n_tokens: int
    """Written."""
    repetition: float
    """Share of its 4-grams that were in it before."""


class SublayerFigures(Record):
    """What one sublayer of the whole model does, on calibration windows."""

    sublayer: str
    alone: float | None
    """Divergence (kl, nats per token) from the whole model to the one without this sublayer alone; null where it is not
    finite."""
    contribution: float
    """Norm of what it adds to the residual stream over the stream's, mean over tokens."""
    heads: tuple[float, ...] = ()
    """Of an attention: the same for what each head adds. They can cancel out. Empty where there are none."""
    peak: float | None
    """Largest absolute activation over the root mean square of a token's, mean over tokens: of the matrix of the
    sublayer whose inputs have the highest. Null where it has no matrix of its own."""


class Measured(Record):
    """One model, measured by itself: what another is compared with later."""

    sha256: str
    """Of its weights."""
    dtype: str
    perplexity: float
    """On the held-out tokens."""
    bits_per_byte: float
    perplexity_by_source: dict[str, float] = Field({})
    """On the held-out tokens of each source; empty where there is one."""
    held_out_sha256: str
    tasks: dict[str, Score]
    tasks_sha256: str | None = None
    """`Evaluate.tasks_sha256` of the settings. No reports of 0.1 have it."""
    doubts: tuple[str, ...] = ()
    """What speaks against a whole model, a sentence each. No reports of 0.1 have it."""
    samples: tuple[Sample, ...] = ()
    sublayers: tuple[SublayerFigures, ...] = ()
    """Of a whole model, by depth."""
    lm_eval_version: str
    transformers_version: str
    torch_version: str


class TaskFigures(Record):
    """What promotion compares of a task."""

    metric: str
    whole: float | None = None
    whole_stderr: float | None = None
    pruned: float | None = None
    pruned_stderr: float | None = None
    retention: float | None
    """pruned / whole, or whole / pruned where lower is better; null where that divides by 0."""
    n_samples: int
    """Documents evaluated."""
    n_available: int
    """Documents the task has; more than n_samples when a limit was set."""
    n_fewshot: int

    @property
    def retention_stderr(self) -> float:
        """Of the retention, to first order, with both models' errors independent; 0 where none was recorded."""
        if not self.retention:
            return 0.0
        scores = ((self.whole, self.whole_stderr), (self.pruned, self.pruned_stderr))
        return self.retention * math.hypot(
            *(error / value for value, error in scores if value and error and math.isfinite(error))
        )


class TaskResult(TaskFigures):
    whole: float
    pruned: float
    generative: bool
    higher_is_better: bool
    smoke: bool
    """Generated from finercut's own templates: not a published benchmark."""


class Evaluation(Record):
    """What promotion compares of an evaluation. What version 0.1 did not record is None."""

    tasks: dict[str, TaskFigures]
    mean_retention: float | None
    perplexity_ratio: float
    dtype: str | None = None
    whole_doubts: tuple[str, ...] = ()
    """What speaks against the whole model that this one was compared with."""
    lm_eval_version: str | None = None
    transformers_version: str | None = None
    seed: int | None = None
    """Of lm-eval's draws; None in a report: `evaluate.seed` in the params.yaml beside it."""


class EvaluateReport(Evaluation):
    note: str
    """What the tasks can and cannot say."""
    dtype: str
    tasks: dict[str, TaskResult]
    whole_perplexity: float
    """On the held-out tokens."""
    pruned_perplexity: float
    whole_perplexity_by_source: dict[str, float] = Field({})
    """On the held-out tokens of each source; empty where there is one."""
    pruned_perplexity_by_source: dict[str, float] = Field({})
    whole_bits_per_byte: float
    pruned_bits_per_byte: float
    unhealed: Measured | None = None
    """The pruned checkpoint before it was healed or quantised; `pruned` is the final one everywhere else. Null where
    neither was done, or evaluate.unhealed is off."""
    samples: tuple[Sample, ...] = ()
    """Of the final checkpoint."""
    lm_eval_version: str
    torch_version: str | None = None

    @property
    def mean_retention_stderr(self) -> float:
        """Of the mean retention, with the tasks' errors independent; 0 without tasks."""
        errors = [task.retention_stderr for task in self.tasks.values() if task.retention is not None]
        return math.hypot(*errors) / len(errors) if errors else 0.0


def written(whole: Measured | None, report: EvaluateReport, final: str) -> dict[str, dict[str, Sample]]:
    """What each model wrote, by prompt; without models that wrote nothing.

    Args:
        final: what the final checkpoint is called: pruned, healed, quantised
    """
    found = {"whole": whole.samples if whole else (), "pruned": report.unhealed.samples if report.unhealed else ()}
    found[final] = report.samples
    return {name: {sample.prompt: sample for sample in samples} for name, samples in found.items() if samples}
