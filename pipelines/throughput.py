"""Stage `throughput`: the whole and the pruned model in vLLM, the same numbers as transformers, then under load."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from finercut.checkpoint.records import ParityReport
from finercut.model.loading import device_of, load_pruned, load_whole
from finercut.model.remote_code import TRUSTED_KEY
from finercut.model.tensors import safetensors_shapes
from finercut.serving import vllm_engine
from finercut.serving.records import EngineFigures, Spread, ThroughputReport
from finercut.serving.settings import Throughput as ThroughputParams
from finercut.serving.vllm_engine import Round
from finercut.tokens import load_tokens
from pipelines import paths
from pipelines.params import Params

logger = logging.getLogger("finercut")

# Held-out windows whose log-probabilities are compared.
N_WINDOWS = 2
# A vLLM worker goes on looking for work, on a whole core, for a second after its last.
SETTLE_S = 1.5


def run(params: Params) -> ThroughputReport:
    """
    Raises:
        FileNotFoundError: a model, the calibration set or the parity report is missing.
        ValueError: the load does not fit the model.
        RuntimeError: the pruned checkpoint has not passed its parity check, vLLM is missing or failed, or it does not
            compute what transformers does. Nothing is timed then.
    """
    settings = params.throughput
    engine = vllm_engine.installed()
    parity = ParityReport.read(paths.PARITY)
    if not parity.passed:
        raise RuntimeError(f"{paths.PARITY} says the pruned model is not the masked whole one: nothing to time")
    tokens = load_tokens(paths.CALIBRATION)
    models: list[tuple[Path, Callable[..., PreTrainedModel]]] = [(paths.MODEL, load_whole), (paths.PRUNED, load_pruned)]
    for directory, _ in models:
        _check_servable(directory, settings.max_model_len)
    n_tokens = settings.max_model_len - vllm_engine.N_GENERATED
    windows = tokens.held_out[:N_WINDOWS, :n_tokens].tolist()
    differences = [_difference(directory, load, windows, settings) for directory, load in models]
    timings = _timings([directory for directory, _ in models], settings)
    whole, pruned = (
        _figures(directory, timing, difference, settings.dtype)
        for (directory, _), timing, difference in zip(models, timings, differences, strict=True)
    )
    ratios = [p.output_tokens_per_s / w.output_tokens_per_s for w, p in zip(*(t.rounds for t in timings), strict=True)]
    report = ThroughputReport(
        whole=whole,
        pruned=pruned,
        speed_up=statistics.median(ratios),
        kv_cache_ratio=pruned.kv_cache_tokens / whole.kv_cache_tokens,
        input_tokens=settings.input_tokens,
        output_tokens=settings.output_tokens,
        concurrency=settings.concurrency,
        n_warmups=settings.n_warmups,
        n_rounds=settings.n_rounds,
        engine=engine,
        torch_version=torch.__version__,
        hardware=timings[0].hardware,
        dtype=settings.dtype,
        enforce_eager=settings.enforce_eager,
        interleave=settings.interleave,
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


def _check_servable(directory: Path, max_model_len: int) -> None:
    file = directory / "config.json"
    if not file.is_file():
        stage = "fetch" if directory == paths.MODEL else "prune"
        raise FileNotFoundError(f"no model in {directory}: run `finercut {stage}` first")
    config = json.loads(file.read_text())
    if TRUSTED_KEY in config:
        raise ValueError(
            f"the model in {directory} runs by Python code of its own, and vLLM has no model of it: it cannot be "
            "timed, and so not be registered; `dvc repro evaluate` does all the rest"
        )
    context = config["max_position_embeddings"]
    if max_model_len > context:
        raise ValueError(f"throughput.max_model_len = {max_model_len}: the model in {directory} takes {context} tokens")
    if max_model_len <= vllm_engine.N_GENERATED + 1:
        needed = vllm_engine.N_GENERATED + 2
        raise ValueError(f"throughput.max_model_len = {max_model_len}: at least {needed} are needed")


def _difference(
    directory: Path,
    load: Callable[..., PreTrainedModel],
    windows: Sequence[Sequence[int]],
    settings: ThroughputParams,
) -> float:
    started = time.monotonic()
    exact = settings.model_copy(update={"dtype": "float32", "concurrency": len(windows)})
    with vllm_engine.engine(directory, exact, one_process=True) as engine:
        served = engine.continuations(windows)
    difference = vllm_engine.largest_difference(served, load(directory, torch.float32, device_of("auto")))
    # Written so that NaN fails too.
    if not difference <= settings.parity_tolerance:
        raise RuntimeError(
            f"vLLM's log-probabilities for {directory} are up to {difference:.4f} nats from transformers' "
            f"(throughput.parity_tolerance is {settings.parity_tolerance}): nothing was timed"
        )
    logger.info(
        "throughput: %s, vLLM's log-probabilities within %.6f nats of transformers', %.0f s",
        directory.name,
        difference,
        time.monotonic() - started,
    )
    return difference


@dataclass(frozen=True)
class Timing:
    """What one engine did under load."""

    rounds: list[Round]
    kv_cache_tokens: int
    hardware: str


def _timings(directories: Sequence[Path], settings: ThroughputParams) -> list[Timing]:
    if not settings.interleave:
        return [timing for directory in directories for timing in _time_in_turn([directory], settings)]
    return _time_in_turn(directories, settings)


def _time_in_turn(directories: Sequence[Path], settings: ThroughputParams) -> list[Timing]:
    with ExitStack() as stack:
        engines = [stack.enter_context(vllm_engine.engine(directory, settings)) for directory in directories]
        rounds: list[list[Round]] = [[] for _ in engines]
        for seed in range(settings.n_warmups + settings.n_rounds):
            for engine, measured in zip(engines, rounds, strict=True):
                if len(engines) > 1:
                    time.sleep(SETTLE_S)
                one = engine.round(seed)
                if seed >= settings.n_warmups:
                    measured.append(one)
                    _tell(engine.directory, one, len(measured), settings.n_rounds)
        return [Timing(r, e.kv_cache_tokens, e.hardware) for e, r in zip(engines, rounds, strict=True)]


def _tell(directory: Path, measured: Round, n: int, n_rounds: int) -> None:
    logger.info(
        "throughput: %s, round %d/%d: %.1f output tokens/s, TTFT %.3f s, TPOT %.4f s",
        directory.name,
        n,
        n_rounds,
        measured.output_tokens_per_s,
        measured.ttft_s,
        measured.tpot_s,
    )


def _figures(directory: Path, timing: Timing, difference: float, dtype: str) -> EngineFigures:
    n_elements = sum(tensor.n_elements for tensor in safetensors_shapes(directory).values())
    return EngineFigures(
        output_tokens_per_s=_spread([r.output_tokens_per_s for r in timing.rounds]),
        ttft_s=_spread([r.ttft_s for r in timing.rounds]),
        tpot_s=_spread([r.tpot_s for r in timing.rounds]),
        kv_cache_tokens=timing.kv_cache_tokens,
        weights_gib=n_elements * getattr(torch, dtype).itemsize / 2**30,
        max_logprob_difference=difference,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))
