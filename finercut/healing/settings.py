"""Section `heal` of params.yaml, by method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from finercut.system.settings import Section

TrainingDtype = Literal["auto", "bfloat16", "float32"]
NotNegative = Annotated[float, Field(ge=0)]


class Unhealed(Section):
    method: Literal["none"]
    """Keep the pruned checkpoint as it is, which is the paper's method."""


class Refit(Section):
    """Fit the output projections of kept sublayers, in order of depth, so that the residual stream behind each gap is
    the whole model's again. Closed form, no gradients."""

    method: Literal["refit"]
    ridges: list[PositiveFloat] = Field(min_length=1)
    """Candidates for the penalty on changing a weight, as shares of the mean square of its input; each projection takes
    the best on windows that its fit did not see."""
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field(min_length=1)
    """Candidates for how much of the change is applied, common to all projections; chosen on held-out tokens."""
    batch_tokens: PositiveInt
    """Tokens that go through a sublayer at once; changes memory and speed only."""
    dtype: TrainingDtype
    """Of the forwards; sums are float64. auto: bfloat16 where the device multiplies in it, else float32."""
    device: str
    """auto, cpu, cuda."""


class _InSteps(Section):
    """A method that trains on some windows at a time."""

    batch_tokens: PositiveInt

    def check(self, n_tokens: int) -> None:
        """
        Args:
            n_tokens: of a window.

        Raises:
            ValueError: a step holds no window.
        """
        if self.batch_tokens < n_tokens:
            raise ValueError(
                f"heal.batch_tokens = {self.batch_tokens} is less than a window of {n_tokens} tokens, which is "
                "calibrate.n_tokens: raise it, or lower that"
            )


class Reconstruct(_InSteps):
    """Train kept sublayers one by one, in order of depth, so that the residual stream behind each is the whole model's
    again: the refit first, then all weights of the sublayer by gradient."""

    method: Literal["reconstruct"]
    sublayers: Literal["gaps", "all"]
    """Which are trained: those right before and right behind a gap, or all from the first gap on. The others are
    refitted only."""
    ridges: list[PositiveFloat]
    """Of the refit that each sublayer starts from; empty: from the pruned model's weights."""
    steps: PositiveInt
    """Of the optimizer, for each sublayer."""
    batch_tokens: PositiveInt
    """Tokens of one step, and that go through a sublayer at once."""
    learning_rate: PositiveFloat
    """Of Adam, at its highest; falls to zero by a cosine."""
    warm_up: Annotated[float, Field(ge=0, lt=1)]
    """Share of a sublayer's steps in which the learning rate rises."""
    eval_every: PositiveInt
    """Steps between evaluations on windows that are not trained on; a sublayer takes the best evaluated state, if it is
    better than the refit."""
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field(min_length=1)
    """Candidates for how much of the whole change is applied; chosen on held-out tokens."""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Of the order of the windows."""
    dtype: TrainingDtype
    """Of the matrix products; trained weights are float32. auto: bfloat16 where the device multiplies in it, else
    float32."""
    device: str
    """auto, cpu, cuda: one device."""


class Distill(_InSteps):
    """Train the pruned model to predict what the whole model predicts."""

    method: Literal["distill"]
    trainable: Literal["blocks", "lora"]
    """blocks: all weights of all blocks, two models in memory. lora: low-rank updates of the blocks' matrices, merged
    at the end; one model in memory. Embeddings, final norm and head stay as they are."""
    lora_rank: PositiveInt
    """Rank of the updates; with trainable: lora only."""
    ridges: list[PositiveFloat] = Field([])
    """Of a refit, in closed form, that training starts from; empty: from the pruned model's weights, as with lora and
    where blocks are not an attention followed by an MLP."""
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field([1.0], min_length=1)
    """Candidates for how much of the refit's change is applied; chosen on held-out tokens."""
    tokens: PositiveInt
    """Tokens to train on; the windows are repeated where there are fewer."""
    repeated_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the windows trained on, how many are made from the others by putting passages of 4 to 32 tokens twice in a
    row, which trains the attention that copies from the context: the model copies more, and repeats itself more."""
    minutes: PositiveFloat | None
    """Limit on the training time, minutes; the schedule ends with it. null: none. A run that reaches it depends on the
    speed of the machine."""
    batch_tokens: PositiveInt
    """Tokens of one optimizer step."""
    learning_rate: PositiveFloat
    """Of AdamW, at its highest; falls to zero by a cosine."""
    warm_up: Annotated[float, Field(ge=0, lt=1)]
    """Share of the training in which the learning rate rises."""
    ce_weight: NotNegative
    """Weight of the cross-entropy with the text, beside KL(whole || pruned) with weight 1; both nats per token."""
    eval_every: PositiveInt
    """Steps between evaluations on held-out tokens; the best evaluated state becomes the checkpoint, and an interrupted
    run continues from the last one."""
    patience: PositiveInt | None
    """Evaluations in a row that bring the held-out divergence below neither the pruned model's nor an earlier one,
    after which training ends; null: never."""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Of the order of the windows and of lora's first weights."""
    dtype: TrainingDtype
    """Of the matrix products; trained weights are float32. auto: bfloat16 where the device multiplies in it, else
    float32."""
    device: str
    """auto, cpu, cuda: one device."""

    def check(self, n_tokens: int) -> None:
        """
        Raises:
            ValueError: a step smaller than a window, or fewer tokens than a step.
        """
        super().check(n_tokens)
        step = self.batch_tokens // n_tokens * n_tokens
        if self.tokens < step:
            raise ValueError(
                f"heal.tokens = {self.tokens} is less than one step of {step}: raise it, or lower heal.batch_tokens"
            )
