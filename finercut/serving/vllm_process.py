"""The process in which a vLLM engine runs: answers the requests of `vllm_engine.Engine`, one line of JSON each."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from finercut.serving.settings import EngineSettings, Load
from finercut.serving.vllm_engine import N_GENERATED, N_LIKELIEST, Continuation, Round
from finercut.system.imports import freeze_imports, large_imports


def _main() -> None:
    # Libraries print to the standard output: keep it to the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    requests: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    settings = EngineSettings.model_validate_json(sys.argv[2])
    llm = _start_vllm(sys.argv[1], settings)
    cache = llm.llm_engine.vllm_config.cache_config
    print(json.dumps({"kv_cache_tokens": cache.kv_cache_size_tokens, "hardware": _hardware()}), file=answers)
    while (request := requests.get()) is not None:
        if "seed" in request:
            answer = asdict(_serve_load(llm, **request))
        elif "sample" in request:
            answer = tokenizer_sample(sys.argv[1])
        else:
            answer = [asdict(c) for c in _continue(llm, [{"prompt_token_ids": w} for w in request["windows"]])]
        print(json.dumps(answer), file=answers)
    llm.llm_engine.engine_core.shutdown()  # gives its shared memory back
    # To take apart what vLLM imported costs Python seconds.
    os._exit(0)


def _listen(requests: SimpleQueue[dict[str, Any] | None]) -> None:
    # Unbuffered: a buffer's lock, held here, would abort a process that ends for an error of its own.
    for line in open(0, "rb", buffering=0):  # noqa: SIM115
        requests.put(json.loads(line))
    # The pipe's other end is the parent's alone: it closes when the parent ends, whatever ended it.
    shutil.rmtree(os.environ["VLLM_RPC_BASE_PATH"], ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _start_vllm(directory: str, settings: EngineSettings) -> Any:
    with large_imports():
        from vllm import LLM
        from vllm.platforms import current_platform

        freeze_imports()  # an engine collects garbage at five places as it starts
    if current_platform.is_cpu():  # the import might take hold of a GPU
        load_class(directory)
    return LLM(**arguments(directory, settings))


def load_class(directory: str) -> None:
    """Give vLLM the model's class: by its name alone it looks at one that it has not met in one more process, which
    imports vLLM."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for name in json.loads(Path(directory, "config.json").read_text(encoding="utf-8")).get("architectures") or []:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def arguments(directory: str, settings: EngineSettings) -> dict[str, Any]:
    """What vLLM is told of an engine."""
    return {
        "model": directory,
        "skip_tokenizer_init": True,
        # Prompts are token ids. To take images too vLLM wants a tokenizer, and on a GPU memory.
        "language_model_only": True,
        "dtype": settings.dtype,
        "enforce_eager": settings.enforce_eager,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.concurrency,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
        # The line above settles it; but vLLM still wants this share of the GPU to be free, beside the other engine.
        "gpu_memory_utilization": 0.01,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }


def _continue(llm: Any, prompts: list[dict[str, Any]]) -> list[Continuation]:
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
    for answer in llm.generate(prompts, sampling, use_tqdm=False):
        generated = answer.outputs[0]
        given = [*answer.prompt_logprobs[1:], *generated.logprobs]
        found.append(
            Continuation(
                tokens=[*answer.prompt_token_ids, *generated.token_ids],
                logprobs=[{token: value.logprob for token, value in position.items()} for position in given],
            )
        )
    return found


def _serve_load(llm: Any, seed: int, **asked: Any) -> Round:
    from vllm import SamplingParams

    load = Load(**asked)
    n_requests = load.n_requests or load.concurrency
    draw = random.Random(seed)
    vocabulary = range(llm.llm_engine.vllm_config.model_config.get_vocab_size())
    prompts = [{"prompt_token_ids": draw.choices(vocabulary, k=load.input_tokens)} for _ in range(n_requests)]
    n = load.output_tokens
    sampling = SamplingParams(temperature=0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    if load.request_rate is None:
        answered = llm.generate(prompts, sampling, use_tqdm=False)
    else:
        answered = _serve_arrivals(llm, prompts, sampling, load.request_rate, load.concurrency, seed)
    seconds = time.perf_counter() - started
    answers = [answer.metrics for answer in answered]
    return Round(
        output_tokens_per_s=n_requests * n / seconds,
        ttft_s=statistics.median(a.first_token_latency for a in answers),
        tpot_s=statistics.median((a.last_token_ts - a.first_token_ts) / (n - 1) for a in answers),
    )


def _serve_arrivals(
    llm: Any, prompts: list[dict[str, Any]], sampling: Any, request_rate: float, concurrency: int, seed: int
) -> list[Any]:
    """The answers to requests that arrive at the times that vLLM's own benchmark draws: Poisson.

    Args:
        concurrency: requests that the engine has at once, at most; the next ones wait, and that counts as theirs.
    """
    import numpy as np
    from vllm.benchmarks.serve import get_request
    from vllm.sampling_params import RequestOutputKind

    sampling.output_kind = RequestOutputKind.FINAL_ONLY
    arrived: SimpleQueue[tuple[float, dict[str, Any]] | None] = SimpleQueue()

    async def arrive() -> None:
        async for prompt, _ in get_request(prompts, request_rate):
            arrived.put((time.time(), prompt))

    np.random.seed(seed)  # whose numbers the benchmark draws
    engine, answers, n_added = llm.llm_engine, [], 0
    with ThreadPoolExecutor(1) as pool:
        arrivals = pool.submit(asyncio.run, arrive())
        arrivals.add_done_callback(lambda _: arrived.put(None))
        while len(answers) < len(prompts):
            idle = n_added == len(answers)
            while n_added < len(prompts) and n_added - len(answers) < concurrency and (idle or not arrived.empty()):
                request = arrived.get()
                if request is None:  # the arrivals ended before the last one
                    raise arrivals.exception()
                at, prompt = request
                engine.add_request(f"{seed}-{n_added}-{at}", prompt, sampling, arrival_time=at)
                n_added, idle = n_added + 1, False
            answers += [answer for answer in engine.step() if answer.finished]
    return answers


def tokenizer_sample(directory: str) -> dict[str, Any]:
    """What vLLM's tokenizer of a model makes of texts; see `finercut.model.tokenizer_files.sample`."""
    from vllm.tokenizers import get_tokenizer

    from finercut.model.tokenizer_files import sample

    return sample(get_tokenizer(directory))


def _hardware() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.get_device_name()
    cpu = Path("/proc/cpuinfo")
    said = cpu.read_text() if cpu.is_file() else ""
    # Of ARM's processors it gives numbers for maker and kind, and no name.
    found = re.search(r"^model name\s*:\s*(.+)$", said, re.MULTILINE)
    kind = re.search(r"^CPU implementer\s*:\s*(\S+)$.*?^CPU part\s*:\s*(\S+)$", said, re.MULTILINE | re.DOTALL)
    name = found[1] if found else " ".join([platform.machine(), *(kind.groups() if kind else ())])
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    _main()
