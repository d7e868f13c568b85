"""Section `evaluate` of params.yaml."""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from finercut.system.settings import AnyDtype, Section, Share


class Task(Section):
    name: str
    """An lm-eval task, or one of the finercut_ smoke tasks."""
    metric: str
    """The headline metric: acc, acc_norm, ...; with its filter where there are several: exact_match,strict-match."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in the prompt; null keeps the task's own."""
    limit: PositiveInt | Share | None = None
    """Documents evaluated, as a number or a share; null takes all."""


class Samples(Section):
    """Continuations that people compare."""

    prompts: list[str]
    """Plain text; of no task."""
    n_tokens: PositiveInt
    """Written after each, at most."""


class Evaluate(Section):
    tasks: list[Task]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    batch_size: PositiveInt
    dtype: AnyDtype
    """Of lm-eval and perplexity, as in search."""
    device: str
    """auto, cpu, cuda, cuda:1, ...; with auto a model too large for one GPU is spread over all."""
    weights_gib: PositiveFloat | None = None
    """Of the device's memory, for weights. Where they need more, sublayers are brought when they run; null: all are
    there."""
    unhealed: bool = True
    """Measure the pruned checkpoint too, where healing or quantising changed it: what selection kept, and what they
    did."""
    samples: Samples = Samples(prompts=[], n_tokens=1)
    """What whole, pruned and final model write after the same prompts, on the page side by side. Without this there is
    none."""
    alone_tokens: Annotated[int, Field(ge=0)] = 0
    """Of a calibration window, at most: on these each sublayer of the whole model is removed alone, a pass a sublayer,
    to see how redundant it is; beside that it is seen what it and its heads add to the stream. 0: nothing of that."""

    @property
    def tasks_sha256(self) -> str:
        """Hash of what scores depend on beside the model."""
        return hashlib.sha256(self.model_dump_json(include={"tasks", "seed"}).encode()).hexdigest()
