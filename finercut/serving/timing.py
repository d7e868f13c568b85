"""Models timed beside each other in vLLM, in turn under the same load, so that what disturbs one disturbs all alike."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence

from finercut.serving.records import OtherLoad, Served, Speed
from finercut.serving.settings import Load, Throughput
from finercut.serving.vllm_engine import Engine, Round
from finercut.system.records import Spread

logger = logging.getLogger("finercut")

# A vLLM worker goes on looking for work, on a whole core, for a second after its last.
SETTLE_S = 1.5


def in_turn(engines: Sequence[Engine], load: Load, settings: Throughput, stage: str) -> list[list[Round]]:
    """The timed rounds of each engine.

    Args:
        stage: what log lines begin with.

    Raises:
        RuntimeError: an engine failed.
    """
    measured: list[list[Round]] = [[] for _ in engines]
    for seed in range(settings.n_warmups + settings.n_rounds):
        for engine, rounds in zip(engines, measured, strict=True):
            if len(engines) > 1:
                time.sleep(SETTLE_S)
            one = engine.round(seed, load)
            if seed >= settings.n_warmups:
                rounds.append(one)
                _tell(stage, engine, load, one, f"{len(rounds)}/{settings.n_rounds}")
    return measured


def _tell(stage: str, engine: Engine, load: Load, measured: Round, which: str) -> None:
    logger.info(
        "%s: %s, %s, round %s: %.1f output tokens/s, TTFT %.3f s, TPOT %.4f s",
        stage,
        engine.directory.name,
        shown(load),
        which,
        measured.output_tokens_per_s,
        measured.ttft_s,
        measured.tpot_s,
    )


def shown(load: Load | Speed | OtherLoad) -> str:
    """For people: `8 requests of 64 + 64 tokens`."""
    requests = f"{load.n_requests or load.concurrency} requests of {load.input_tokens} + {load.output_tokens} tokens"
    if load.request_rate is None:
        return requests
    return f"{requests}, {load.request_rate:g} a second, {load.concurrency} at once at most"


def served(rounds: Sequence[Round]) -> Served:
    return Served(
        output_tokens_per_s=spread([r.output_tokens_per_s for r in rounds]),
        ttft_s=spread([r.ttft_s for r in rounds]),
        tpot_s=spread([r.tpot_s for r in rounds]),
    )


def speed_up(load: Load, whole: Sequence[Round], pruned: Sequence[Round]) -> Spread:
    """Of the rounds that were taken one after the other."""
    return spread([w.token_s(load) / p.token_s(load) for w, p in zip(whole, pruned, strict=True)])


def spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))
