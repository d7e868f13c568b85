"""The claim of serving: vLLM computes what transformers does."""

from __future__ import annotations

import torch
from torch import Tensor

from finercut.checkpoint.records import Claim
from finercut.model import tokenizer_files
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load
from finercut.model.remote_code import TRUSTED_KEY
from finercut.serving import vllm_engine
from finercut.serving.settings import EngineSettings

# Windows whose log-probabilities are compared, and the most tokens of each.
N_WINDOWS = 2
N_TOKENS = 496
KV_CACHE_GIB = 1.0


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


def claim(name: str, model: ModelDirectory, held_out: Tensor, tolerance: float, device: torch.device) -> Claim:
    """Compare log-probabilities in float32 on held-out windows and on what vLLM generates after them.

    Args:
        name: of the claim.
        held_out: token ids, (samples, tokens).
        tolerance: nats.

    Raises:
        RuntimeError: vLLM is missing or failed.
        ValueError: its tokenizer makes other tokens.
    """
    n_tokens = min(N_TOKENS, held_out.shape[1], model.language.max_position_embeddings - vllm_engine.N_GENERATED)
    windows = held_out[:N_WINDOWS, :n_tokens].tolist()
    settings = EngineSettings(
        concurrency=len(windows),
        dtype="float32",
        max_model_len=n_tokens + vllm_engine.N_GENERATED,
        kv_cache_gib=KV_CACHE_GIB,
        enforce_eager=True,
    )
    with vllm_engine.engine(model.path, settings, one_process=True) as engine:
        served = engine.continuations(windows)
        if tokenizer_files.present(model.path):
            expected, where = tokenizer_files.sample(model.tokenizer), f"vLLM loads the tokenizer in {model}"
            tokenizer_files.check_sample(expected, engine.tokenizer_sample(), where)
    difference = vllm_engine.largest_difference(served, load(model, torch.float32, device))
    return Claim(
        name=name,
        statement="vLLM's log-probabilities are those of transformers",
        holds=difference <= tolerance,  # false for NaN
        figures={"max_logprob_difference": difference, "n_tokens": sum(len(c.tokens) for c in served)},
        limit=tolerance,
    )
