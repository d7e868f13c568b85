"""The claim of serving: vLLM computes what transformers does."""

from __future__ import annotations

import torch
from torch import Tensor

from finercut.checkpoint.records import Claim
from finercut.checkpoint.settings import Prove
from finercut.model import tokenizer_files
from finercut.model.configs import QUANTISATION
from finercut.model.devices import device_of
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load
from finercut.serving import vllm_engine
from finercut.serving.settings import EngineSettings

# Windows whose log-probabilities are compared, and the most tokens of each.
N_WINDOWS = 2
N_TOKENS = 496
KV_CACHE_GIB = 1.0


def engine_settings(model: ModelDirectory, n_tokens: int, settings: Prove) -> EngineSettings:
    """Of the engine whose log-probabilities are compared.

    Args:
        n_tokens: of a held-out window.

    Raises:
        ValueError: the model's context is too short.
    """
    context = model.context
    compared = min(N_TOKENS, n_tokens, context - vllm_engine.N_GENERATED)
    if compared < 2:
        raise ValueError(
            f"the model's context of {context} tokens is too short to compare vLLM with transformers: "
            f"{vllm_engine.N_GENERATED + 2} are needed"
        )
    return EngineSettings(
        concurrency=N_WINDOWS,
        dtype="float32",
        max_model_len=compared + vllm_engine.N_GENERATED,
        kv_cache_gib=KV_CACHE_GIB,
        enforce_eager=True,
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
    )


def claim(name: str, model: ModelDirectory, held_out: Tensor, settings: Prove) -> Claim:
    """Compare log-probabilities on held-out windows and on what vLLM generates after them: in float32, where vLLM
    multiplies the weights in it. transformers has quantised weights dequantised.

    Args:
        name: of the claim.
        held_out: token ids, (samples, tokens).

    Raises:
        RuntimeError: vLLM is missing or failed.
        ValueError: its tokenizer makes other tokens.
    """
    compared = engine_settings(model, held_out.shape[1], settings)
    tolerance = settings.log_probability_tolerance
    if QUANTISATION in model.settings:
        tolerance = settings.quantised_tolerance
        if device_of("auto").type != "cpu":
            compared = compared.model_copy(update={"dtype": "bfloat16"})  # GPU kernels take no float32
    windows = held_out[:N_WINDOWS, : compared.max_model_len - vllm_engine.N_GENERATED].tolist()
    alone = compared.tensor_parallel_size * compared.pipeline_parallel_size == 1
    with vllm_engine.engine(model.path, compared, one_process=alone) as engine:
        served = engine.continuations(windows)
        if tokenizer_files.present(model.path):
            expected, where = tokenizer_files.sample(model.tokenizer), f"vLLM loads the tokenizer in {model}"
            tokenizer_files.check_sample(expected, engine.tokenizer_sample(), where)
    loaded = load(model, torch.float32, device_of(settings.device), weights_gib=settings.weights_gib)
    difference = vllm_engine.largest_difference(served, loaded)
    return Claim(
        name=name,
        statement="vLLM's log-probabilities are those of transformers",
        holds=difference <= tolerance,  # false for NaN
        figures={"max_logprob_difference": difference, "n_tokens": sum(len(c.tokens) for c in served)},
        limit=tolerance,
    )
