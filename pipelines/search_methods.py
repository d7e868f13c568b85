"""What each `search.method` selects, continued where it was interrupted; its progress goes to the log and to MLflow."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finercut.registry import live
from finercut.selection import evolution, greedy, swaps, trajectory
from finercut.selection.baselines import OBJECTIVES, ORDERS
from finercut.selection.bench import measured
from finercut.selection.evolution import Generation
from finercut.selection.settings import NOT_NESTED, STEPWISE
from finercut.selection.trajectory import Removal, Step
from finercut.sublayers import Candidate, parse

from . import paths
from .search_job import Job

logger = logging.getLogger("finercut")


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
        if not (within := goal.within(order)):
            raise ValueError(
                f"search.swaps: the first removal, {order[0]}, is already over the budget, so that there is nothing to "
                "exchange: raise prune.budget, or set search.fill to true"
            )
        order, n_swaps = _swapped(job, within)
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
    fill = goal.fills or settings.method == "evolutionary"
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
    moments: list[float] = []
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
                moments.append(time.monotonic())
                _tell(removal, bar.total, left_s(moments, bar.total - removal.step))
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


def work_saved(removal: Removal) -> float:
    """Share of brute force's sublayer passes that a step did without."""
    return 1 - removal.sublayer_passes / removal.brute_force_sublayer_passes


def left_s(moments: Sequence[float], n_left: int) -> float | None:
    """Seconds that `n_left` removals take, from when those of this process were found; None before the second.

    The first says nothing: it waits for the model, and evaluates every candidate, of which later ones skip most.
    """
    if len(moments) < 2:
        return None
    return (moments[-1] - moments[0]) / (len(moments) - 1) * max(0, n_left)


def _tell(removal: Removal, n_removals: int, eta_s: float | None) -> None:
    n_open = sum(map(len, (removal.values, removal.abandoned, removal.stale, removal.dropped)))
    refitted = removal.refitted
    logger.info(
        "search: %d/%d removed %s, divergence %.4f, held-out %.4f%s, %d of %d candidates evaluated, %.0f %% of brute "
        "force saved%s",
        removal.step,
        n_removals,
        removal.sublayer,
        removal.divergence,
        removal.held_out_divergence,
        f" (refitted {refitted.divergence:.4f}, {refitted.held_out_divergence:.4f})" if refitted else "",
        removal.evaluations,
        n_open,
        100 * work_saved(removal),
        "" if eta_s is None else f", about {eta_s:.0f} s left",
    )
    live.log_metrics(
        {
            "search.divergence": removal.divergence,
            "search.held_out_divergence": removal.held_out_divergence,
            "search.evaluations": removal.evaluations,
            "search.work_saved": work_saved(removal),
        }
        | ({} if eta_s is None else {"search.eta_s": eta_s})
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
