"""Times the whole model in vLLM beside a few pruned ones, under the load of `throughput`, for the stage `costs`.

The pruned models are written, timed and deleted one after another.
"""

from __future__ import annotations

import logging
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from finercut.checkpoint.writing import write_pruned
from finercut.model.costs import costs_of
from finercut.model.directory import ModelDirectory
from finercut.model.fitted_costs import fitted, groups_of, removal_sets
from finercut.model.records import Fit, Timed
from finercut.serving import timing, vllm_engine
from finercut.serving.settings import EngineSettings, Throughput
from finercut.serving.vllm_engine import Engine, Round
from finercut.sublayers import KINDS, Sublayer, parse
from finercut.system.records import Spread

from . import paths

logger = logging.getLogger("finercut")


def measured(settings: Throughput) -> dict[str, object]:
    """The fields of the report that are measured.

    Raises:
        FileNotFoundError: the model is missing.
        ValueError: vLLM has no such model.
        RuntimeError: vLLM is missing or failed.
    """
    model = ModelDirectory(paths.MODEL).written_by("fetch")
    installed, start = vllm_engine.installed(), settings.engine
    vllm_engine.check_servable(model)
    groups = groups_of(model, costs_of(model))
    sets = removal_sets(groups)
    wholes: list[list[Round]] = []
    pruned: list[list[Round]] = []
    with _whole(model, settings, start) as (beside, hardware):
        for number, removed in enumerate(sets, 1):
            with _pruned(model, removed) as directory, vllm_engine.engine(directory, start) as engine:
                whole_rounds, pruned_rounds = beside(engine)
            wholes.append(whole_rounds)
            pruned.append(pruned_rounds)
            logger.info("costs: %d/%d models timed: %s", number, len(sets), directory.name)
    whole_s = [r for rounds in wholes for r in rounds]

    def fit(of: Callable[[Round], float]) -> tuple[Fit, list[Spread]]:
        ratios = [
            timing.spread([of(p) / of(w) for w, p in zip(ours, theirs, strict=True)])
            for ours, theirs in zip(wholes, pruned, strict=True)
        ]
        by_set = {tuple(removed): ratio for removed, ratio in zip(sets, ratios, strict=True)}
        return fitted(groups, 1000 * statistics.median(map(of, whole_s)), by_set), ratios

    time, time_ratios = fit(lambda r: r.token_s(settings))
    tpot, tpot_ratios = fit(lambda r: r.tpot_s)
    for name, found in (("time", time), ("tpot", tpot)):
        logger.info("costs: %s", _told(name, found))
    return {
        "time": time,
        "tpot": tpot,
        "timed": [
            Timed(removed=list(map(str, removed)), time_ratio=a, tpot_ratio=b)
            for removed, a, b in zip(sets, time_ratios, tpot_ratios, strict=True)
        ],
        "whole_sha256": model.weights_sha256,
        "engine": installed,
        "torch_version": torch.__version__,
        "hardware": hardware(),
        "dtype": start.dtype,
        "n_rounds": settings.n_rounds,
    }


@contextmanager
def _whole(
    model: ModelDirectory, settings: Throughput, start: EngineSettings
) -> Iterator[tuple[Callable[[Engine], list[list[Round]]], Callable[[], str]]]:
    """What times the whole model beside another, and what then says on which hardware.

    The whole model's engine stays; where two do not fit, it is timed first, once, and ends.
    """
    with vllm_engine.engine(model.path, start) as engine:
        if settings.interleave:
            yield lambda other: timing.in_turn([engine, other], settings, settings, "costs"), lambda: engine.hardware
            return
        hardware = engine.hardware
        (rounds,) = timing.in_turn([engine], settings, settings, "costs")
    yield lambda other: [rounds, *timing.in_turn([other], settings, settings, "costs")], lambda: hardware


@contextmanager
def _pruned(model: ModelDirectory, removed: Sequence[Sublayer]) -> Iterator[Path]:
    """The checkpoint less `removed`, for as long as the block lasts; called by how many of each kind it lacks."""
    counts = {kind: sum(s.kind == kind for s in removed) for kind in KINDS}
    folder = paths.WORK / "costs"
    shutil.rmtree(folder, ignore_errors=True)
    directory = folder / "-".join(["less", *(f"{n}-{kind}" for kind, n in counts.items() if n)])
    directory.mkdir(parents=True)
    try:
        write_pruned(model, removed, directory, {}, "")
        yield directory
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _told(name: str, fit: Fit) -> str:
    groups = ", ".join(
        f"{len(group.sublayers)} {parse(group.sublayers[0]).sublayers[0].kind} {group.ms:.3g} each"
        for group in fit.groups
    )
    return (
        f"{name}, ms per output token: base {fit.base_ms:.3g}, {groups}; a prediction may be off by "
        f"{100 * fit.error:.1f} % (spread of the rounds {100 * fit.spread:.1f}, residual {100 * fit.residual:.1f})"
    )
