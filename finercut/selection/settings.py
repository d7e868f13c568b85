"""Section `search` of params.yaml, and budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from finercut.system.settings import AnyDtype, Section, Share

Divergence = Literal["js", "kl", "angular", "norm", "js_official", "trajectory", "perplexity", "task"]
CostName = Literal["sublayers", "parameters", "kv_cache", "memory", "time", "tpot"]
Unit = Literal["sublayers", "parameters", "kv_cache", "memory_gib", "speed_up", "tpot_ms"]
TARGETS: Mapping[str, CostName] = {"memory_gib": "memory", "speed_up": "time", "tpot_ms": "tpot"}
"""Units in which a budget says what the pruned model is to come to, each with the cost that it is counted in."""
MEASURED = ("time", "tpot")
"""Costs that only vLLM can tell."""
SMALLER_IS_MORE = ("memory_gib", "tpot_ms")
"""Units in which a smaller amount takes more removals."""

ALL_KINDS = ("attention", "mlp", "both", "blocks")
CANDIDATES_OF: Mapping[str, Sequence[str]] = {
    "greedy": (*ALL_KINDS, "any"),
    "evolutionary": (*ALL_KINDS, "any"),
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
NOT_NESTED = ("gromov", "evolutionary")
"""Methods whose selections for two budgets need have nothing in common."""


NOT_MONOTONE = ("perplexity", "task")
"""Objectives that may well fall with a removal: earlier values are no bounds. Partial sums are: no term is negative."""


class Evolution(Section):
    """Of method evolutionary."""

    start: Literal["greedy", "random"] = "greedy"
    """The first selection: what greedy search finds for the budget, or candidates in random order."""
    generations: PositiveInt = 40
    offspring: PositiveInt = 16
    """Selections tried in each generation."""
    most_exchanged: PositiveInt = 3
    """Removals that are put back for one of the offspring, at most; others go in their place."""


class Stop(Section):
    """Limits on the controls: the search ends before the first removal that passes one. null: none."""

    agreement: Share | None = None
    """Least share of the held-out tokens after which the most likely token is the whole model's."""
    repetition: Share | None = None
    """Largest share of repeated 4-grams in greedy continuations."""
    missing_ends: Share | None = None
    """Largest share of greedy continuations without an end. With few tokens, the whole model ends hardly any."""


class Refitting(Section):
    """Refit in the search's loop, as heal.method refit: kept output projections are fitted to the healing windows, and
    the next candidates are judged with them."""

    every: PositiveInt = 1
    """Removals between two refits."""
    ridges: list[PositiveFloat] = Field([0.001, 0.01, 0.1, 0.3, 1.0], min_length=1)
    """Candidates for the penalty on changing a weight; see heal.ridges."""
    batch_tokens: PositiveInt = 2048
    """Tokens that go through a sublayer at once; changes memory and speed only."""


class Search(Section):
    method: Literal[
        "greedy",
        "evolutionary",
        "random",
        "last_blocks",
        "shortgpt",
        "gromov",
        "llm_drop",
        "sleb",
        "block_pruner",
        "one_shot",
    ] = "greedy"
    """greedy is FinerCut's; evolutionary exchanges removals of a selection at random, in EvoPress's manner; the others
    are baselines, see docs/search.md. random: in random order, by `seed`.
    last_blocks: from the output on. shortgpt: the blocks that turn the residual stream least. gromov: the consecutive
    blocks that turn it least together. llm_drop: the sublayers that turn it least. one_shot: by the divergence of each
    removal alone. sleb and block_pruner: blocks, or sublayers, greedily by perplexity."""
    divergence: Divergence
    """What a search keeps low. Between the whole and the pruned model's outputs: js, kl and js_official (nats per
    token), angular, norm. Between their hidden states along the depth: trajectory. Without the whole model: perplexity
    (negative log-likelihood of the text), task (of the answers in `task`)."""
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
    micro_batch_tokens: Annotated[int, Field(ge=1, lt=2**31)] | Literal["auto"]
    """Tokens that go through a sublayer at once; auto: what fits the caches of a CPU, the free memory of a GPU."""
    per: CostName | None = None
    """greedy: remove the candidate that raises the divergence least per unit of what it saves of this cost. null: the
    one that raises it least. memory, time and tpot are those of a budget in memory_gib, speed_up and tpot_ms."""
    fill: bool = False
    """Go on with what still fits prune.budget where the next removal does not. Without, that one ends the search.
    Changes nothing for a budget in memory_gib, speed_up or tpot_ms, which the last removal oversteps."""
    swaps: Annotated[int, Field(ge=0, le=100)] = 0
    """greedy: rounds, at most, of trying to put each removed candidate back and to remove another in its place, which
    saves as much."""
    refit: Refitting | None = None
    """greedy, mode exact: choose for a model that is refitted after removals. The pruned checkpoint has the whole
    model's weights all the same: heal.method refit or reconstruct refits it. null: choose for the model as it is."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of random and evolutionary."""
    evolution: Evolution = Evolution()
    task: str | None = None
    """Divergence task: a .jsonl file of labelled examples, {"prompt": ..., "answer": ...} or {"prompt": ..., "choices":
    [...], "answer": index}; the last quarter is held out."""
    continuations: Annotated[int, Field(ge=0, le=1000)] = 4
    """Held-out windows whose beginnings are continued greedily after each removal, to see repetition and missing ends;
    0 for none. Where weights are streamed, each token costs a pass of all of them."""
    continuation_tokens: PositiveInt = 32
    """Of each."""
    stop: Stop = Stop()
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
        if self.method not in ("greedy", "evolutionary") and self.mode != "exact":
            # Perplexity falls with some removals: what it came to in earlier steps is no bound.
            raise ValueError(f"mode {self.mode} belongs to method greedy, not {self.method}: set it to exact")
        if self.method not in STEPWISE and self.exclude is not None:
            raise ValueError(f"exclude belongs to methods that go step by step, not {self.method}: set it to null")
        if self.divergence in NOT_MONOTONE and self.mode != "exact":
            raise ValueError(
                f"divergence {self.divergence} falls with some removals, so mode {self.mode} is wrong: set it to exact"
            )
        if (self.divergence == "task") != (self.task is not None):
            raise ValueError("divergence task and a file of examples, search.task, go together: give both or neither")
        if self.divergence == "task" and self.method not in ("greedy", "evolutionary"):
            raise ValueError(f"divergence task belongs to methods greedy and evolutionary, not {self.method}")
        if self.method != "greedy" and (self.swaps or (self.per and self.method != "evolutionary")):
            raise ValueError(f"per and swaps belong to method greedy, not {self.method}: set them to null and 0")
        if not self.continuations and (self.stop.repetition or self.stop.missing_ends):
            raise ValueError("stop.repetition and stop.missing_ends need continuations: set continuations to 4, say")
        if self.stop != Stop() and (self.swaps or self.method in NOT_NESTED):
            raise ValueError(
                "stop cannot cut what swaps and methods gromov and evolutionary find, which is for one budget: set its "
                "limits to null"
            )
        if self.per and self.mode == "racing":
            raise ValueError("mode racing cannot weigh divergences against costs: with per, set it to exact or lazy")
        if self.exclude is not None and (self.swaps or self.candidates == "any"):
            raise ValueError("exclude goes neither with swaps nor with candidates any: set it to null, and use protect")
        if self.refit and (self.method != "greedy" or self.swaps or self.mode != "exact"):
            # Divergences fall with a refit: what one came to in earlier steps is no bound.
            raise ValueError("refit goes with method greedy, mode exact and no swaps: set these, or refit to null")
        if self.refit and (self.n_processes > 1 or self.weights_gib is not None):
            raise ValueError("refit needs all weights on one device: set n_processes to 1 and weights_gib to null")
        if self.refit and self.stop != Stop():
            raise ValueError("stop judges the model without its refit: set its limits to null, or refit")
        if self.removals != "auto" and (self.fill or self.swaps or self.method in NOT_NESTED):
            raise ValueError(
                "fill, swaps and methods gromov and evolutionary need to know what to reach: set removals to auto"
            )
        return self


class Budget(Section):
    """How much is to go: the most removals of the trajectory that stay within it. In memory_gib, speed_up and tpot_ms,
    what is to be reached: the fewest removals that do."""

    unit: Unit
    """memory_gib: of the weights and of the KV cache of throughput's load, in the dtype of the checkpoint. speed_up and
    tpot_ms: in vLLM under throughput's load, as the stage costs measured what sublayers take there."""
    amount: PositiveInt | PositiveFloat
    """sublayers: a number, or a share of the whole model's. parameters, kv_cache: a share. speed_up: times the whole
    model's speed. memory_gib, tpot_ms: most GiB, or ms per output token, of the pruned model."""

    @property
    def cost(self) -> CostName:
        """What it is counted in."""
        return TARGETS.get(self.unit, self.unit)

    @property
    def is_target(self) -> bool:
        return self.unit in TARGETS

    @model_validator(mode="after")
    def _amount_suits_unit(self) -> Budget:
        amount = self.amount
        if self.unit == "sublayers" and amount >= 1 and not isinstance(amount, int):
            raise ValueError(f"a budget in sublayers is a number of them or a share between 0 and 1, got {amount}")
        if self.unit in ("parameters", "kv_cache") and amount >= 1:
            raise ValueError(f"a budget in {self.unit} is a share between 0 and 1, got {amount}")
        if self.unit == "speed_up" and amount <= 1:
            raise ValueError(f"a budget in speed_up is above 1, as many times the whole model's speed, got {amount}")
        return self
