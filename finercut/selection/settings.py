"""Section `search` of params.yaml, and budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from finercut.system.settings import AnyDtype, Section, Share

Divergence = Literal["js", "kl", "angular", "norm", "js_official"]
CostName = Literal["sublayers", "parameters", "kv_cache"]

ALL_KINDS = ("attention", "mlp", "both", "blocks")
CANDIDATES_OF: Mapping[str, Sequence[str]] = {
    "greedy": (*ALL_KINDS, "any"),
    "random": ALL_KINDS,
    "one_shot": ALL_KINDS,
    "last_blocks": ("blocks",),
    "shortgpt": ("blocks",),
    "gromov": ("blocks",),
    "llm_drop": ("attention", "mlp", "both"),
    "sleb": ("blocks",),
    "block_pruner": ("both",),
}
"""What each method can choose among, as `search.candidates`."""
STEPWISE = ("greedy", "sleb", "block_pruner")
"""Methods that judge every candidate anew after each removal: what `exclude` is about."""
NOT_NESTED = ("gromov",)
"""Methods whose selections for two budgets need have nothing in common."""


class Search(Section):
    method: Literal[
        "greedy", "random", "last_blocks", "shortgpt", "gromov", "llm_drop", "sleb", "block_pruner", "one_shot"
    ] = "greedy"
    """greedy is FinerCut's; the others are baselines, see docs/search.md. random: in random order, by `seed`.
    last_blocks: from the output on. shortgpt: the blocks that turn the residual stream least. gromov: the consecutive
    blocks that turn it least together. llm_drop: the sublayers that turn it least. one_shot: by the divergence of each
    removal alone. sleb and block_pruner: blocks, or sublayers, greedily by perplexity."""
    divergence: Divergence
    """Between the whole and the pruned model's outputs; nats per token for js, kl and js_official."""
    candidates: Literal["attention", "mlp", "both", "blocks", "any"]
    """What one removal takes out. any: a single sublayer or a whole block."""
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
    per: CostName | None = None
    """greedy: remove the candidate that raises the divergence least per unit of what it saves of this cost. null: the
    one that raises it least."""
    fill: bool = False
    """Go on with what still fits prune.budget where the next removal does not. Without, that one ends the search."""
    swaps: Annotated[int, Field(ge=0, le=100)] = 0
    """greedy: rounds, at most, of trying to put each removed candidate back and to remove another in its place, which
    saves as much."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of random."""
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

    @model_validator(mode="after")
    def _method_can_use_it(self) -> Search:
        can = CANDIDATES_OF[self.method]
        if self.candidates not in can:
            raise ValueError(
                f"method {self.method} cannot choose among candidates {self.candidates}: {' or '.join(can)}"
            )
        if self.method != "greedy" and self.mode != "exact":
            # Perplexity falls with some removals: what it came to in earlier steps is no bound.
            raise ValueError(f"mode {self.mode} belongs to method greedy, not {self.method}: set it to exact")
        if self.method not in STEPWISE and self.exclude is not None:
            raise ValueError(f"exclude belongs to methods that go step by step, not {self.method}: set it to null")
        if self.method != "greedy" and (self.per or self.swaps):
            raise ValueError(f"per and swaps belong to method greedy, not {self.method}: set them to null and 0")
        if self.per and self.mode == "racing":
            raise ValueError("mode racing cannot weigh divergences against costs: with per, set it to exact or lazy")
        if self.exclude is not None and (self.swaps or self.candidates == "any"):
            raise ValueError("exclude goes neither with swaps nor with candidates any: set it to null, and use protect")
        if self.removals != "auto" and (self.fill or self.swaps or self.method in NOT_NESTED):
            raise ValueError("fill, swaps and method gromov need to know what to reach: set removals to auto")
        return self


class Budget(Section):
    """How much is to go: the most removals of the trajectory that stay within it."""

    unit: CostName
    amount: PositiveInt | Share
    """A share of the whole model; or, of sublayers only, a number."""

    @model_validator(mode="after")
    def _numbers_count_sublayers(self) -> Budget:
        if self.unit != "sublayers" and self.amount >= 1:
            raise ValueError(f"a budget in {self.unit} is a share between 0 and 1, got {self.amount}")
        return self
