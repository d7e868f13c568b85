"""vLLM's engines one after another in one process, which imports vLLM once; test_vllm_engines.py runs it as a script.

Its argument is {"prompts": token ids, "again": token ids}; each line of its input a model's directory; each line of its
output what an engine of that model made of the prompts, or {"error": why there is none}. One with a processor is given
an image too.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

KV_CACHE_BYTES = 2**20
BLOCK = 32
"""Tokens of a block of the KV cache; the least that vLLM takes on a CPU."""
CHUNK = 24
"""Tokens of a prompt that are done at once."""
MAX_MODEL_LEN = 128
SEEING = {"limit_mm_per_prompt": {"image": 1}, "mm_processor_cache_gb": 0, "skip_mm_profiling": True}


def main() -> None:
    # Libraries print to the standard output: keep it to the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    import vllm  # noqa: F401  (while the caller makes the models)

    for line in sys.stdin:
        # An engine collects garbage at five places: what vLLM's import left need not be looked through each time.
        gc.collect()
        gc.freeze()
        try:
            answer = serve(line.rstrip("\n"), **json.loads(sys.argv[1]))
        except (ValueError, RuntimeError, AssertionError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


def serve(directory: str, prompts: list[list[int]], again: list[list[int]]) -> dict:
    from vllm import LLM, SamplingParams

    from finercut.serving import vllm_engine, vllm_process

    vllm_process.load_class(directory)
    sees = (Path(directory) / "processor_config.json").exists()
    llm = LLM(
        model=directory,
        skip_tokenizer_init=not sees,  # which needs a tokenizer
        language_model_only=not sees,
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=4,
        max_num_batched_tokens=CHUNK,
        block_size=BLOCK,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        gpu_memory_utilization=0.01,
        enable_prefix_caching=True,
        **SEEING if sees else {},
    )
    continuations = [asdict(c) for c in vllm_process._continue(llm, [{"prompt_token_ids": p} for p in prompts])]
    # Without the log-probabilities of the prompt, for which vLLM would have to compute what it has in its cache.
    sampling = SamplingParams(
        temperature=0,
        max_tokens=vllm_engine.N_GENERATED,
        ignore_eos=True,
        detokenize=False,
        logprobs=vllm_engine.N_LIKELIEST,
    )
    cached = []
    for one in llm.generate([{"prompt_token_ids": p} for p in again], sampling, use_tqdm=False):
        tokens, logprobs = one.outputs[0].token_ids, one.outputs[0].logprobs
        generated = [{token: value.logprob for token, value in position.items()} for position in logprobs]
        unasked = [{}] * (len(one.prompt_token_ids) - 1)
        continuations.append({"tokens": [*one.prompt_token_ids, *tokens], "logprobs": unasked + generated})
        cached.append(one.num_cached_tokens)
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    seen = look(llm) if sees else None
    return {"continuations": continuations, "n_cached": cached, "n_blocks": blocks, "seen": seen}


def look(llm: Any) -> dict:
    """What the engine makes of a text with an image in it, which it prepares by itself."""
    from multimodal_models import TEXT_AND_PICTURE, picture

    from finercut.serving import vllm_process

    prompt = {"prompt": TEXT_AND_PICTURE, "multi_modal_data": {"image": picture()}}
    return asdict(*vllm_process._continue(llm, [prompt]))


if __name__ == "__main__":
    main()
