"""Stage `search`: the model and the calibration set in, the trajectory and its curves out."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import finercut
from finercut.model.costs import costs_of
from finercut.model.devices import device_of, dtype_of
from finercut.model.directory import ModelDirectory
from finercut.model.families import fixed_sublayers
from finercut.model.loading import load_on
from finercut.registry import live
from finercut.report.pictures import divergence_curves
from finercut.selection import distributed, evolution, greedy, swaps, trajectory
from finercut.selection.baselines import OBJECTIVES, ORDERS
from finercut.selection.bench import Bench, measured, source_weights
from finercut.selection.controls import Continuations, end_tokens
from finercut.selection.evolution import Generation
from finercut.selection.examples import Examples, read_examples
from finercut.selection.goal import Goal
from finercut.selection.records import SearchReport
from finercut.selection.repair import Repair
from finercut.selection.settings import NOT_NESTED, STEPWISE, Budget, Search
from finercut.selection.trajectory import Provenance, Removal, Step, Trajectory
from finercut.sources.records import FetchReport
from finercut.sublayers import Candidate, parse
from finercut.system.staging import staged_file
from finercut.tokens import Tokens, load_tokens

from . import paths
from .params import Params

logger = logging.getLogger("finercut")

# Held-out divergence this many times the calibration's: the removals fit the calibration set, not the model's use.
PART_RATIO = 1.5
# A trajectory is continued only by the code that began it: these rooms'.
SEARCHING = ("model", "selection")


def run(params: Params) -> SearchReport | None:
    """Select by `search.method`, continuing where an interrupted search of the same provenance stopped.

    With `n_processes`, in that many processes; started by torchrun, as one of its processes.

    Returns:
        The report; None in all processes of torchrun's but the first, which alone writes files and logs.

    Raises:
        FileNotFoundError: the model or the calibration set is missing.
        ValueError: more is to be removed than there is.
        RuntimeError: another process of the search has ended.
    """
    n_processes = params.search.n_processes
    if n_processes > 1 and not distributed.started():
        _inputs(params.search, params.prune.budget)  # report bad input once, not from every process
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "params.yaml"
            file.write_text(params.model_dump_json(by_alias=True), encoding="utf-8")
            distributed.start(n_processes, ["-m", f"{__package__}.cli", "search", "--params", str(file)])
        return SearchReport.read(paths.report("search"))
    with distributed.ranks() as ranks:
        return _search(params.search, params.prune.budget, ranks)


def is_stale(params: Params) -> bool:
    """Whether the task's examples were edited after the search: DVC knows their path alone."""
    path = paths.report("search")
    if params.search.task is None or not path.is_file() or not Path(params.search.task).is_file():
        return False
    recorded = json.loads(path.read_text(encoding="utf-8")).get("task_file_sha256")
    return recorded != _file_sha256(params.search.task)


def prepared(settings: Search, budget: Budget, ranks: distributed.Ranks) -> Job:
    """
    Raises:
        As `run`.
    """
    if not ranks.first:
        logger.setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
    settings, fetched, tokens, goal, examples = _inputs(settings, budget)
    device = device_of(settings.device, ranks.local_rank)
    dtype = dtype_of(settings.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    budget_decides = settings.fill or settings.swaps or settings.method in NOT_NESTED
    provenance = Provenance(
        method=settings.method,
        per=settings.per,
        swaps=settings.swaps,
        budget=f"{budget.amount} {budget.unit}" if budget_decides else None,
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
        code_sha256=_code_sha256(),
    )
    if len(set(ranks.gather(provenance.key))) > 1:
        raise ValueError("the processes differ in model, tokens, settings, code or versions; give all the same")
    if dtype == torch.bfloat16 != dtype_of("auto", device):
        logger.warning("search: this CPU does not multiply in bfloat16; search.dtype: float32 is several times faster")
    load = functools.cache(lambda: _load(settings, dtype, device, ranks))
    return Job(settings, goal, tokens, examples, provenance, ranks, load, time.monotonic())


def _search(settings: Search, budget: Budget, ranks: distributed.Ranks) -> SearchReport | None:
    job = prepared(settings, budget, ranks)
    found = selected(job)
    if not ranks.first:
        return None
    live.finish()
    finished = Trajectory(job.provenance, found.steps)
    # Remove the stale report first, so that a crash cannot leave it beside the new trajectory.
    paths.report("search").unlink(missing_ok=True)
    trajectory.write(paths.TRAJECTORY, finished)
    selection = finished.selection()
    if found.stopped is not None:
        logger.warning("search: ended after %d removals: the next one's %s", len(found.steps), found.stopped)
        selection = selection.model_copy(update={"left": []})
    selection.write(paths.SELECTION)
    _write_curve(finished)
    divergence_curves(finished, paths.CURVE_PICTURE)
    report = _report(finished, settings, job.goal.n_candidates, found, time.monotonic() - job.started)
    if report.curves_part:
        logger.warning(
            "search: divergence on held-out tokens%s is %.2f times the calibration's: the removals fit the calibration "
            "set; make it larger or broader",
            *_worst(finished.removals[-1]),
        )
    report.write(paths.report("search"))
    return report


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


@dataclass(frozen=True)
class Selected:
    steps: tuple[Step, ...]
    removals: tuple[Removal, ...] = ()
    """Of the greedy search that led to them, if one did."""
    resumed_after: int = 0
    n_swaps: int = 0
    n_generations: int = 0
    stopped: str | None = None
    """The limit of `search.stop` that the removal after these passes."""


def selected(job: Job) -> Selected:
    """What `search.method` selects; every process of the search returns the same."""
    settings, goal = job.settings, job.goal
    if settings.method == "evolutionary":
        return _evolved(job)
    if settings.method not in STEPWISE:
        with job.bench() as bench:
            order = ORDERS[settings.method](bench, goal)
        return _measured(job, order if settings.method in NOT_NESTED else goal.take(order))
    if settings.method in OBJECTIVES:
        logger.info("search: by %s; divergences follow once all is chosen", OBJECTIVES[settings.method])
    found = _greedy(job)
    order = [parse(removal.sublayer) for removal in found.removals]
    if settings.swaps:
        order, n_swaps = _swapped(job, goal.within(order))
        measured = _measured(job, order)
        return replace(measured, removals=found.removals, resumed_after=found.resumed_after, n_swaps=n_swaps)
    if settings.method in OBJECTIVES:
        return replace(_measured(job, order), removals=found.removals, resumed_after=found.resumed_after)
    return found


def _stopped(job: Job, steps: Sequence[Step]) -> tuple[int, str] | None:
    """How many of these steps pass no limit of `search.stop`, and which limit the next one passes; None if all keep it.

    Raises:
        ValueError: the first one passes a limit.
    """
    passed = ((n, job.goal.passed(step.controls)) for n, step in enumerate(steps))
    n, why = next(((n, why) for n, why in passed if why), (len(steps), None))
    if why is not None and n == 0:
        raise ValueError(f"search.stop leaves nothing to remove: after the first removal, {steps[0].sublayer}, {why}")
    return None if why is None else (n, why)


def _greedy(job: Job) -> Selected:
    """The removals of greedy search, up to the goal or to a limit of `search.stop`."""
    settings, goal, ranks = job.settings, job.goal, job.ranks
    fill = settings.fill or settings.method == "evolutionary"
    provenance = job.provenance.model_copy(
        update={
            "method": "greedy",
            "divergence": OBJECTIVES.get(settings.method, settings.divergence),
            "swaps": 0,
            "budget": job.provenance.budget if fill else None,
            "seed": None,
            "evolution": None,
            "continuations": job.provenance.continuations if settings.method == "greedy" else None,
        }
    )
    in_progress = paths.WORK / "search" / provenance.key / paths.TRAJECTORY.name
    (text, *_) = ranks.gather(trajectory.resume(in_progress, provenance).to_text() if ranks.first else None)
    found = trajectory.parse_trajectory(text, str(in_progress))
    removals = list(found.removals)
    names = [removal.sublayer for removal in removals]

    def ended() -> Selected | None:
        """What was found, if the search is at its end."""
        end, stopped = goal.end(names), _stopped(job, removals) if settings.method == "greedy" else None
        if stopped is not None and (end is None or stopped[0] < end):
            n, why = stopped
            return Selected(tuple(removals[:n]), tuple(removals[:n]), min(resumed_after, n), stopped=why)
        return None if end is None else Selected(tuple(removals[:end]), tuple(removals[:end]), min(resumed_after, end))

    resumed_after = len(removals)
    at_end = ended()
    if resumed_after:
        logger.info(
            "search: %d removals found by an earlier search", resumed_after if at_end is None else at_end.resumed_after
        )
    if at_end is not None:
        return at_end
    with job.bar("search", "removal", initial=resumed_after, total=goal.estimate(names)) as bar:
        for removal in greedy.search(
            job.load(),
            *job.windows,
            goal.n_most,
            divergence=provenance.divergence,
            kinds=settings.candidates,
            protect=settings.protect,
            exclude=settings.exclude,
            per=goal.per,
            allows=goal.allows if fill else None,
            mode=settings.mode,
            error_probability=settings.error_probability,
            first_windows=provenance.first_windows,
            earlier=found.removals,
            repair=job.repair(),
            ranks=ranks,
            progress=bar.refresh,
            **job.measured_with | ({} if settings.method == "greedy" else {"continuations": None}),
        ):
            removals.append(removal)
            names.append(removal.sublayer)
            if ranks.first:
                trajectory.append(in_progress, removal)
            at_end = ended()
            if ranks.first:
                bar.set_postfix(
                    divergence=f"{removal.divergence:.4f}", saved=f"{work_saved(removal):.0%}", refresh=False
                )
                bar.total = goal.estimate(names) if at_end is None else len(at_end.steps)
                bar.update()
                _tell(removal, bar.total, time.monotonic() - job.started, resumed_after)
            if at_end is not None:
                return at_end
    return Selected(tuple(removals), tuple(removals), resumed_after)


def _evolved(job: Job) -> Selected:
    """What the evolutionary method makes of its start."""
    goal, found = job.goal, Selected(())
    if job.settings.evolution.start == "greedy":
        found = _greedy(job)
    start = goal.within([parse(removal.sublayer) for removal in found.removals]) or evolution.at_random(goal)
    in_progress = paths.WORK / "search" / job.provenance.key / "generations.jsonl"
    (lines, *_) = job.ranks.gather(
        [line.to_json() for line in trajectory.read_lines(in_progress, Generation)] if job.ranks.first else None
    )
    generations = [Generation.model_validate_json(line) for line in lines]
    total = job.settings.evolution.generations
    with (
        job.bench(evolution.after(start, generations)) as bench,
        job.bar("evolution", "generation", initial=len(generations), total=total) as bar,
    ):
        for generation in evolution.evolve(bench, goal, start, tuple(generations), bar.refresh):
            generations.append(generation)
            if job.ranks.first:
                trajectory.append(in_progress, generation)
                bar.update()
                _tell_generation(generation, len(generations), total)
    measured = _measured(job, evolution.after(start, generations))
    return replace(measured, removals=found.removals, resumed_after=found.resumed_after, n_generations=len(generations))


def _swapped(job: Job, order: list[Candidate]) -> tuple[list[Candidate], int]:
    """The removals once swaps improved them, and how many were replaced."""
    in_progress = paths.WORK / "search" / job.provenance.key / "swaps.jsonl"
    (lines, *_) = job.ranks.gather(
        [trial.to_json() for trial in trajectory.read_lines(in_progress, swaps.Trial)] if job.ranks.first else None
    )
    trials = [swaps.Trial.model_validate_json(line) for line in lines]
    total = job.settings.swaps * len(order)
    with (
        job.bench(swaps.after(order, trials)) as bench,
        job.bar("swaps", "trial", initial=len(trials), total=total) as bar,
    ):
        found = swaps.swap(bench, order, job.settings.swaps, job.goal.replacements, tuple(trials), bar.refresh)
        for trial in found:
            trials.append(trial)
            if job.ranks.first:
                trajectory.append(in_progress, trial)
                bar.update()
                _tell_trial(trial, len(trials), total)
    return swaps.after(order, trials), sum(trial.taken is not None for trial in trials)


def _measured(job: Job, order: Sequence[Candidate]) -> Selected:
    """An order with what is measured after each of its removals, up to a limit of `search.stop`."""
    steps: list[Step] = []
    with job.bench() as bench:
        for step in measured(bench, order):
            if stopped := _stopped(job, [*steps, step]):
                return Selected(tuple(steps), stopped=stopped[1])
            steps.append(step)
            if job.ranks.first:
                _tell_step(step, len(order))
    return Selected(tuple(steps))


def _inputs(settings: Search, budget: Budget) -> tuple[Search, FetchReport, Tokens, Goal, Examples | None]:
    """The settings with what the model itself protects, and what the other stages left."""
    fetched = FetchReport.read(paths.report("fetch"))
    tokens = load_tokens(paths.CALIBRATION)
    tokens.check_vocabulary(fetched.vocab_size)
    whole = ModelDirectory(paths.MODEL).written_by("fetch")
    fixed = fixed_sublayers(whole.config)
    for sublayer, why in fixed.items():
        logger.info("search: %s stays: %s", sublayer, why)
    settings = settings.model_copy(update={"protect": sorted({*settings.protect, *map(str, fixed)})})
    goal = Goal(settings, budget, costs_of(whole), fetched.n_blocks)
    goal.check()
    if settings.refit is not None and (tokens.healing is None or distributed.started()):
        raise ValueError(
            "search.refit fits to healing windows, and there are none: set calibrate.n_healing_samples"
            if tokens.healing is None
            else "search.refit works in one process: start it without torchrun"
        )
    examples = None
    if settings.task is not None:
        examples = read_examples(Path(settings.task), whole.tokenizer, fetched.max_position_embeddings)
    return settings, fetched, tokens, goal, examples


def _file_sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


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


def _code_sha256() -> str:
    """Over the names and contents of the modules in the rooms that search."""
    root = Path(finercut.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(file for room in SEARCHING for file in (root / room).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def work_saved(removal: Removal) -> float:
    """Share of brute force's sublayer passes that a step did without."""
    return 1 - removal.sublayer_passes / removal.brute_force_sublayer_passes


def _tell(removal: Removal, n_removals: int, seconds: float, resumed_after: int) -> None:
    n_open = sum(map(len, (removal.values, removal.abandoned, removal.stale, removal.dropped)))
    eta_s = seconds / (removal.step - resumed_after) * max(0, n_removals - removal.step)
    refitted = removal.refitted
    logger.info(
        "search: %d/%d removed %s, divergence %.4f, held-out %.4f%s, %d of %d candidates evaluated, %.0f %% of brute "
        "force saved, about %.0f s left",
        removal.step,
        n_removals,
        removal.sublayer,
        removal.divergence,
        removal.held_out_divergence,
        f" (refitted {refitted.divergence:.4f}, {refitted.held_out_divergence:.4f})" if refitted else "",
        removal.evaluations,
        n_open,
        100 * work_saved(removal),
        eta_s,
    )
    live.log_metrics(
        {
            "search.divergence": removal.divergence,
            "search.held_out_divergence": removal.held_out_divergence,
            "search.evaluations": removal.evaluations,
            "search.work_saved": work_saved(removal),
            "search.eta_s": eta_s,
        }
        | _controls(removal),
        step=removal.step,
    )


def _controls(step: Step) -> dict[str, float]:
    """What was measured of them, by the names of its metrics."""
    shown = {} if step.controls is None else step.controls.model_dump(exclude_none=True)
    return {f"search.{name}": value for name, value in shown.items()}


def _tell_step(step: Step, n_removals: int) -> None:
    logger.info(
        "search: %d/%d %s, divergence %.4f, held-out %.4f",
        step.step,
        n_removals,
        step.sublayer,
        step.divergence,
        step.held_out_divergence,
    )


def _tell_trial(trial: swaps.Trial, n_done: int, n_most: int) -> None:
    logger.info(
        "search: swap %d of %d at most, %s %s, divergence %.4f, held-out %.4f",
        n_done,
        n_most,
        trial.put_back,
        "stays removed" if trial.taken is None else f"put back for {trial.taken}",
        trial.divergence,
        trial.held_out_divergence,
    )


def _tell_generation(generation: Generation, n_done: int, n_all: int) -> None:
    logger.info(
        "search: generation %d of %d, %s, divergence %.4f, held-out %.4f",
        n_done,
        n_all,
        f"{', '.join(generation.put_back)} put back for {', '.join(generation.taken)}"
        if generation.put_back
        else f"none of {generation.n_offspring} is better",
        generation.divergence,
        generation.held_out_divergence,
    )


def _write_curve(finished: Trajectory) -> None:
    with staged_file(paths.CURVE) as partial, partial.open("w", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", "sublayer", "divergence", "held_out_divergence"])
        table.writerows([r.step, r.sublayer, r.divergence, r.held_out_divergence] for r in finished.removals)


def _worst(last: Step) -> tuple[str, float]:
    """The source with the highest held-out divergence, for people, and that over the calibration's."""
    by_source = {f" of {name}": value for name, value in last.held_out_by_source.items()}
    where, held_out = max((by_source or {"": last.held_out_divergence}).items(), key=lambda found: found[1])
    if not held_out:
        return where, 0.0
    return where, held_out / last.divergence if last.divergence else math.inf


def _report(finished: Trajectory, settings: Search, n_candidates: int, found: Selected, seconds: float) -> SearchReport:
    last = finished.removals[-1]
    margins = [r.margin for r in found.removals if r.margin is not None]
    return SearchReport(
        method=finished.provenance.name,
        nested=finished.provenance.nested,
        n_swaps=found.n_swaps,
        n_generations=found.n_generations,
        task_file_sha256=None if settings.task is None else _file_sha256(settings.task),
        stopped=found.stopped,
        controls=last.controls,
        final_refitted=last.refitted if isinstance(last, Removal) else None,
        mode=settings.mode,
        least_margin=min(margins, default=None),
        largest_fall=max((r.largest_fall for r in found.removals), default=0.0),
        error_probability=sum(r.error_probability for r in found.removals),
        divergence=settings.divergence,
        n_candidates=n_candidates,
        n_removals=len(finished.removals),
        removals=[r.sublayer for r in finished.removals],
        final_divergence=last.divergence,
        final_held_out_divergence=last.held_out_divergence,
        final_held_out_by_source=last.held_out_by_source,
        curves_part=_worst(last)[1] > PART_RATIO,
        evaluations=sum(r.evaluations for r in found.removals),
        sublayer_passes=sum(r.sublayer_passes for r in found.removals),
        brute_force_sublayer_passes=sum(r.brute_force_sublayer_passes for r in found.removals),
        resumed_after=found.resumed_after,
        seconds=seconds,
    )
