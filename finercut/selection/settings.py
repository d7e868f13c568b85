"""Section `search` of params.yaml, and budgets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from finercut.system.settings import AnyDtype, Section, Share

Divergence = Literal["js", "kl", "angular", "norm", "js_official"]


class Search(Section):
    divergence: Divergence
    """Between the whole and the pruned model's outputs; nats per token for js, kl and js_official."""
    candidates: Literal["attention", "mlp", "both", "blocks"]
    protect: list[str]
    """Sublayers and blocks that must stay: 0.block, 12.attention."""
    exclude: Annotated[float, Field(ge=0, lt=1)] | None
    """The authors' rule that keeps the front blocks out of reach at first (they use 0.4); null switches it off."""
    mode: Literal["exact", "lazy", "racing"]
    """What candidates are given up for before they are evaluated to the end. exact: for a divergence that is already
    above another's; the removals are those of brute force. lazy: also for their divergence in earlier steps. racing:
    also when a t-test on part of the calibration set says that they are behind."""
    error_probability: Share
    """Racing: the chance, at most, that the test drops the right candidate, in each step."""
    micro_batch_tokens: PositiveInt | Literal["auto"]
    """Tokens that go through a sublayer at once; auto: what fits the caches of a CPU, the free memory of a GPU."""
    removals: PositiveInt | Share | Literal["auto"] = "auto"
    """How far the search goes: auto, as far as prune.budget needs; or candidates removed, as a number or as a share.
    Budgets up to here need no new search."""
    dtype: AnyDtype
    """auto: bfloat16 where the device multiplies in it, else float32."""
    device: str
    """auto, cpu, cuda, cuda:1, ... auto: the GPUs where there are any, more than one if a process is alone and the
    weights do not fit one."""
    weights_gib: PositiveFloat | None
    """Most of the device's memory that weights may take; a larger model is streamed from CPU memory, a sublayer at a
    time. null keeps all of them on the device."""
    n_processes: PositiveInt
    """Processes on this machine that share the calibration windows; on GPUs, one a GPU."""


class Budget(Section):
    """How much is to go: the most removals of the trajectory that stay within it."""

    unit: Literal["sublayers", "parameters", "kv_cache"]
    amount: PositiveInt | Share
    """A share of the whole model; or, of sublayers only, a number."""

    @model_validator(mode="after")
    def _numbers_count_sublayers(self) -> Budget:
        if self.unit != "sublayers" and self.amount >= 1:
            raise ValueError(f"a budget in {self.unit} is a share between 0 and 1, got {self.amount}")
        return self
