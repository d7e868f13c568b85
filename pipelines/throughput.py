"""Stage `throughput`: times the whole model and the final checkpoint in vLLM, in turn, under the same loads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from finercut.checkpoint.records import ProveReport
from finercut.model.configs import QUANTISATION
from finercut.model.directory import ModelDirectory
from finercut.serving import timing, vllm_engine
from finercut.serving.records import EngineFigures, OtherLoad, ThroughputReport
from finercut.serving.settings import EngineSettings, Throughput
from finercut.serving.vllm_engine import Round

from . import paths
from .params import Params

logger = logging.getLogger("finercut")


def run(params: Params) -> ThroughputReport:
    """
    Raises:
        FileNotFoundError: a model or the report of `prove` is missing.
        RuntimeError: a claim does not hold, or vLLM is missing or failed.
    """
    settings, start = params.throughput, params.throughput.engine
    engine = vllm_engine.installed()
    proved = ProveReport.read(paths.report("prove"))
    if not proved.holds:
        raise RuntimeError(f"{paths.report('prove')} has a claim that does not hold: nothing to time")
    models = [
        ModelDirectory(paths.MODEL).written_by("fetch"),
        ModelDirectory(paths.FINAL).written_by(list(paths.CHAIN)[-1]),
    ]
    for model in models:
        vllm_engine.check_servable(model)
    timings = _timings([model.path for model in models], settings, start)
    whole, pruned = (_figures(m, timed, start.dtype) for m, timed in zip(models, timings, strict=True))
    speed_up, *others = [
        timing.speed_up(load, *rounds)
        for load, *rounds in zip(settings.loads, *(timed.rounds for timed in timings), strict=True)
    ]
    report = ThroughputReport(
        whole=whole,
        pruned=pruned,
        speed_up=speed_up.median,
        speed_up_spread=speed_up,
        kv_cache_ratio=pruned.kv_cache_tokens / whole.kv_cache_tokens,
        input_tokens=settings.input_tokens,
        output_tokens=settings.output_tokens,
        concurrency=settings.concurrency,
        request_rate=settings.request_rate,
        n_requests=settings.n_requests,
        n_warmups=settings.n_warmups,
        n_rounds=settings.n_rounds,
        engine=engine,
        torch_version=torch.__version__,
        hardware=timings[0].hardware,
        dtype=start.dtype,
        enforce_eager=settings.enforce_eager,
        kv_cache_gib=settings.kv_cache_gib,
        max_model_len=settings.max_model_len,
        interleave=settings.interleave,
        more_loads=[
            OtherLoad(
                **load.model_dump(),
                whole=timing.served(timings[0].rounds[number]),
                pruned=timing.served(timings[1].rounds[number]),
                speed_up=ratio.median,
                speed_up_spread=ratio,
            )
            for number, (load, ratio) in enumerate(zip(settings.more_loads, others, strict=True), 1)
        ],
    )
    logger.info(
        "throughput: %.1f -> %.1f output tokens/s, %.2f times as fast, %.2f times the KV cache",
        whole.output_tokens_per_s.median,
        pruned.output_tokens_per_s.median,
        report.speed_up,
        report.kv_cache_ratio,
    )
    report.write(paths.report("throughput"))
    return report


@dataclass(frozen=True)
class Timing:
    """What one engine did under load."""

    rounds: list[list[Round]]
    """The timed ones of each load."""
    kv_cache_tokens: int
    hardware: str


def _timings(directories: Sequence[Path], settings: Throughput, start: EngineSettings) -> list[Timing]:
    if not settings.interleave:
        return [timing for directory in directories for timing in _time_in_turn([directory], settings, start)]
    return _time_in_turn(directories, settings, start)


def _time_in_turn(directories: Sequence[Path], settings: Throughput, start: EngineSettings) -> list[Timing]:
    with ExitStack() as stack:
        engines = [stack.enter_context(vllm_engine.engine(directory, start)) for directory in directories]
        by_load = [timing.in_turn(engines, load, settings, "throughput") for load in settings.loads]
        timings = [
            Timing(list(rounds), e.kv_cache_tokens, e.hardware)
            for e, rounds in zip(engines, zip(*by_load, strict=True), strict=True)
        ]
        for engine in engines:  # all at once
            engine.end()
        return timings


def _figures(model: ModelDirectory, timed: Timing, dtype: str) -> EngineFigures:
    return EngineFigures(
        **dict(timing.served(timed.rounds[0])),
        kv_cache_tokens=timed.kv_cache_tokens,
        weights_gib=(
            model.weights_bytes if QUANTISATION in model.settings else model.n_elements * getattr(torch, dtype).itemsize
        )
        / 2**30,
    )
