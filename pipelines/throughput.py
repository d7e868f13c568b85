"""Stage `throughput`: times the whole model and the final checkpoint in vLLM, in turn, under the same loads."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from finercut.checkpoint.records import ProveReport
from finercut.model.directory import ModelDirectory
from finercut.model.quantised import CONFIG_KEY
from finercut.serving import vllm_engine
from finercut.serving.claim import check_servable
from finercut.serving.records import EngineFigures, OtherLoad, Served, Spread, ThroughputReport
from finercut.serving.settings import EngineSettings, Load, Throughput
from finercut.serving.vllm_engine import Round

from . import paths
from .params import Params

logger = logging.getLogger("finercut")

# A vLLM worker goes on looking for work, on a whole core, for a second after its last.
SETTLE_S = 1.5


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
        check_servable(model)
    timings = _timings([model.path for model in models], settings, start)
    whole, pruned = (_figures(m, timing, start.dtype) for m, timing in zip(models, timings, strict=True))
    speed_up, *others = [_speed_up(*rounds) for rounds in zip(*(timing.rounds for timing in timings), strict=True)]
    report = ThroughputReport(
        whole=whole,
        pruned=pruned,
        speed_up=speed_up.median,
        speed_up_spread=speed_up,
        kv_cache_ratio=pruned.kv_cache_tokens / whole.kv_cache_tokens,
        input_tokens=settings.input_tokens,
        output_tokens=settings.output_tokens,
        concurrency=settings.concurrency,
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
                whole=_served(timings[0].rounds[number]),
                pruned=_served(timings[1].rounds[number]),
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
        rounds: list[list[list[Round]]] = [[[] for _ in settings.loads] for _ in engines]
        for number, load in enumerate(settings.loads):
            for seed in range(settings.n_warmups + settings.n_rounds):
                for engine, measured in zip(engines, rounds, strict=True):
                    if len(engines) > 1:
                        time.sleep(SETTLE_S)
                    one = engine.round(seed, load)
                    if seed >= settings.n_warmups:
                        measured[number].append(one)
                        _tell(engine.directory, load, one, f"{len(measured[number])}/{settings.n_rounds}")
        return [Timing(r, e.kv_cache_tokens, e.hardware) for e, r in zip(engines, rounds, strict=True)]


def _tell(directory: Path, load: Load, measured: Round, which: str) -> None:
    logger.info(
        "throughput: %s, %d requests of %d + %d tokens, round %s: %.1f output tokens/s, TTFT %.3f s, TPOT %.4f s",
        directory.name,
        load.concurrency,
        load.input_tokens,
        load.output_tokens,
        which,
        measured.output_tokens_per_s,
        measured.ttft_s,
        measured.tpot_s,
    )


def _figures(model: ModelDirectory, timing: Timing, dtype: str) -> EngineFigures:
    return EngineFigures(
        **dict(_served(timing.rounds[0])),
        kv_cache_tokens=timing.kv_cache_tokens,
        weights_gib=(
            model.weights_bytes if CONFIG_KEY in model.settings else model.n_elements * getattr(torch, dtype).itemsize
        )
        / 2**30,
    )


def _served(rounds: Sequence[Round]) -> Served:
    return Served(
        output_tokens_per_s=_spread([r.output_tokens_per_s for r in rounds]),
        ttft_s=_spread([r.ttft_s for r in rounds]),
        tpot_s=_spread([r.tpot_s for r in rounds]),
    )


def _speed_up(whole: Sequence[Round], pruned: Sequence[Round]) -> Spread:
    return _spread([p.output_tokens_per_s / w.output_tokens_per_s for w, p in zip(whole, pruned, strict=True)])


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))
