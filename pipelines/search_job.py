"""What the methods of the stage `search` are given: the inputs, the model, and what identifies the search."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from finercut.model.costs import costs_of
from finercut.model.devices import device_of, dtype_of
from finercut.model.directory import ModelDirectory
from finercut.model.families import fixed_sublayers
from finercut.model.fitted_costs import costs_with
from finercut.model.loading import load_on
from finercut.selection import distributed
from finercut.selection.bench import Bench
from finercut.selection.controls import Continuations, end_tokens, prefix_tokens
from finercut.selection.examples import Examples, read_examples
from finercut.selection.goal import Goal
from finercut.selection.repair import Repair
from finercut.selection.settings import NOT_NESTED, Budget, Search
from finercut.selection.trajectory import Provenance
from finercut.sources.records import FetchReport
from finercut.sublayers import Candidate, Sublayer
from finercut.system.digests import code_sha256
from finercut.tokens import Tokens, load_tokens, source_weights

from . import paths
from .params import Params

logger = logging.getLogger("finercut")

# A trajectory is continued only by the code that began it.
SEARCHING = ("model", "selection", "sublayers.py", "tokens.py")


def prepared(settings: Search, budget: Budget, ranks: distributed.Ranks) -> Job:
    """
    Raises:
        FileNotFoundError: the model or the calibration set is missing.
        ValueError: they or the settings cannot be searched, or the processes of the search differ.
    """
    if not ranks.first:
        logger.setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
    settings, fetched, tokens, goal, examples = inputs(settings, budget)
    device = device_of(settings.device, ranks.local_rank)
    dtype = dtype_of(settings.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    budget_decides = goal.fills or settings.swaps or settings.method in NOT_NESTED
    provenance = Provenance(
        method=settings.method,
        per=settings.per,
        swaps=settings.swaps,
        budget=f"{budget.amount} {budget.unit}" if budget_decides else None,
        costs_sha256=goal.costs_sha256({settings.per, budget.cost if budget_decides else None}),
        seed=settings.seed if settings.method in ("random", "evolutionary") else None,
        evolution=settings.evolution.model_dump_json() if settings.method == "evolutionary" else None,
        task_sha256=None if examples is None else examples.sha256,
        refit=settings.refit and f"{settings.refit.model_dump_json()} on {tokens.healing_sha256}",
        continuations=_continuations(settings),
        model_source=fetched.source,
        model_revision=fetched.revision,
        model_sha256=fetched.sha256,
        n_blocks=fetched.n_blocks,
        calibration_sha256=tokens.calibration_sha256,
        held_out_sha256=tokens.held_out_sha256,
        divergence=settings.divergence,
        candidates=settings.candidates,
        protect=sorted(settings.protect),
        exclude=settings.exclude,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        mode=settings.mode,
        error_probability=settings.error_probability if settings.mode == "racing" else None,
        first_windows=_first_windows(settings, fetched.n_parameters * dtype.itemsize, len(tokens.calibration)),
        window_weights=window_weights(tokens),
        code_sha256=code_sha256(SEARCHING),
    )
    if len(set(ranks.gather(provenance.key))) > 1:
        raise ValueError("the processes differ in model, tokens, settings, code or versions; give all the same")
    if dtype == torch.bfloat16 != dtype_of("auto", device):
        logger.warning("search: this CPU does not multiply in bfloat16; search.dtype: float32 is several times faster")
    load = functools.cache(lambda: _load(settings, dtype, device, ranks))
    return Job(settings, goal, tokens, examples, provenance, ranks, load, time.monotonic())


@dataclass(frozen=True)
class Job:
    """What every method is given."""

    settings: Search
    goal: Goal
    tokens: Tokens
    examples: Examples | None
    """Of divergence task: they decide in place of the calibration tokens."""
    provenance: Provenance
    ranks: distributed.Ranks
    load: Callable[[], PreTrainedModel]
    """The whole model, once."""
    started: float
    """On the monotonic clock."""

    def bench(self, removed: Sequence[Candidate] = ()) -> Bench:
        return Bench(
            self.load(),
            *self.windows,
            self.settings.divergence,
            removed=[s for candidate in removed for s in candidate.sublayers],
            ranks=self.ranks,
            **self.measured_with,
        )

    @property
    def windows(self) -> tuple[Tensor, Tensor]:
        """What decides, and what is held out."""
        return (self.tokens.calibration, self.tokens.held_out) if self.examples is None else self.examples.windows

    @functools.cached_property
    def measured_with(self) -> dict[str, Any]:
        return {
            # Divergences are means over sources.
            **{f"{name}_sources": self._sources(name) for name in ("calibration", "held_out")},
            "targets": None if self.examples is None else self.examples.targets,
            "continuations": self._continuations(),
            "micro_batch_tokens": self.micro_batch_tokens,
        }

    def _sources(self, name: str) -> tuple[str, ...]:
        return self.tokens.sources_of(name) if self.examples is None else ()

    def _continuations(self) -> Continuations | None:
        """
        Raises:
            ValueError: `search.stop` has a limit on ends, and the model knows no token for them.
        """
        settings = self.settings
        if settings.stop.missing_ends is not None and not end_tokens(self.load()):
            raise ValueError(
                "search.stop.missing_ends: the model has no end-of-sequence token, so no text ends; set it to null"
            )
        if not settings.continuations:
            return None
        return Continuations(self.tokens.held_out, settings.continuations, settings.continuation_tokens)

    def repair(self) -> Repair | None:
        """
        Raises:
            ValueError: see `Repair`.
        """
        refit = self.settings.refit
        return None if refit is None else Repair(self.load(), self.tokens.healing, refit)

    @property
    def micro_batch_tokens(self) -> int | None:
        wanted = self.settings.micro_batch_tokens
        return None if wanted == "auto" else wanted

    def bar(self, what: str, unit: str, **shown: Any) -> tqdm:
        return tqdm(desc=what, unit=unit, disable=None if self.ranks.first else True, **shown)


def inputs(settings: Search, budget: Budget) -> tuple[Search, FetchReport, Tokens, Goal, Examples | None]:
    """The settings with what the model itself protects, and what the other stages left."""
    fetched = FetchReport.read(paths.report("fetch"))
    tokens = load_tokens(paths.CALIBRATION)
    tokens.check_vocabulary(fetched.vocab_size)
    whole = ModelDirectory(paths.MODEL).written_by("fetch")
    fixed = fixed_sublayers(whole.config)
    for sublayer, why in fixed.items():
        logger.info("search: %s stays: %s", sublayer, why)
    settings = _protecting(settings, fixed)
    goal = Goal(settings, budget, costs_with(whole, paths.report("costs")), fetched.n_blocks)
    goal.check()
    _check_devices(settings)
    _check_windows(settings, *tokens.calibration.shape, fetched.max_position_embeddings)
    if settings.refit is not None and (tokens.healing is None or distributed.started()):
        raise ValueError(
            "search.refit fits to healing windows, and there are none: set calibrate.n_healing_samples"
            if tokens.healing is None
            else "search.refit works in one process: start it without torchrun"
        )
    examples = None
    if settings.task is not None:
        examples = _examples(settings, whole, fetched.max_position_embeddings)
    return settings, fetched, tokens, goal, examples


def check(params: Params, whole: ModelDirectory) -> None:
    """What `inputs` would refuse, as far as the model and the settings say it.

    Raises:
        ValueError: it would.
    """
    settings, calibrate = _protecting(params.search, fixed_sublayers(whole.config)), params.calibrate
    costs = costs_of(whole)
    # Others are measured before the search.
    if {settings.per, params.prune.budget.cost} <= {None, *costs}:
        Goal(settings, params.prune.budget, costs, whole.language.num_hidden_layers).check()
    _check_devices(settings)
    _check_windows(settings, calibrate.n_samples, calibrate.n_tokens, whole.context)
    if settings.task is not None:
        _examples(settings, whole, whole.context)


def _check_devices(settings: Search) -> None:
    """
    Raises:
        ValueError: a process of the search would have none.
    """
    by_number = settings.device in ("auto", "cuda") and torch.cuda.is_available() and not distributed.started()
    if by_number and settings.n_processes > torch.cuda.device_count():
        raise ValueError(
            f"search.n_processes = {settings.n_processes}: each takes a GPU, and here are {torch.cuda.device_count()}: "
            "lower it, or set search.device to cpu"
        )


def _protecting(settings: Search, fixed: Iterable[Sublayer]) -> Search:
    return settings.model_copy(update={"protect": sorted({*settings.protect, *map(str, fixed)})})


def _examples(settings: Search, whole: ModelDirectory, context: int) -> Examples:
    examples = read_examples(Path(settings.task), whole.tokenizer, context)
    if (n_deciding := len(examples.windows[0])) < settings.n_processes:
        raise ValueError(
            f"search.n_processes = {settings.n_processes} cannot share the {n_deciding} examples of search.task that "
            "decide: lower it, or give more examples"
        )
    return examples


def _check_windows(settings: Search, n_windows: int, n_tokens: int, context: int) -> None:
    if settings.task is None and n_windows < settings.n_processes:
        raise ValueError(
            f"search.n_processes = {settings.n_processes} cannot share {n_windows} calibration windows: lower it, or "
            "raise calibrate.n_samples"
        )
    most = context - prefix_tokens(n_tokens)
    if settings.continuations and settings.continuation_tokens > most:
        raise ValueError(
            f"search.continuation_tokens = {settings.continuation_tokens}: after {prefix_tokens(n_tokens)} held-out "
            f"tokens the model's context of {context} has room for {most}"
        )


def _continuations(settings: Search) -> str | None:
    return f"{settings.continuations} of {settings.continuation_tokens} tokens" if settings.continuations else None


def _load(settings: Search, dtype: torch.dtype, device: torch.device, ranks: distributed.Ranks) -> PreTrainedModel:
    # Other processes have the other GPUs.
    alone = settings.device == "auto" and ranks.size == 1
    return load_on(paths.MODEL, dtype, "auto" if alone else str(device), settings.weights_gib)


def _first_windows(settings: Search, weights_bytes: int, n_windows: int) -> int:
    """All where few candidates are begun and a part costs the transfer of all weights, however little it computes."""
    streamed = settings.weights_gib is not None and weights_bytes > settings.weights_gib * 2**30
    return n_windows if streamed and settings.mode == "lazy" else 1


def window_weights(tokens: Tokens) -> list[float] | None:
    """Of the calibration windows; None where all count alike."""
    weights = source_weights(tokens.sources_of("calibration"))
    return weights if any(weight != 1 for weight in weights) else None
