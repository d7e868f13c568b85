"""The claim of serving: vLLM computes what transformers does.

Where inputs of matrices are quantised, one that rounding puts on the other side of a boundary is a whole step off, and
so is more of what follows from it. transformers' own log-probabilities differ then by tenths of a nat where the last
bits of the embeddings differ, and vLLM is asked to differ from transformers by no more than that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finercut.checkpoint.records import Claim
from finercut.checkpoint.settings import Prove
from finercut.model import tokenizer_files
from finercut.model.configs import QUANTISATION
from finercut.model.costs import cached_numbers
from finercut.model.devices import device_of, dtype_of
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load
from finercut.model.quantised import rounds_inputs
from finercut.serving import vllm_engine
from finercut.serving.settings import EngineSettings
from finercut.serving.vllm_engine import Continuation

# Windows whose log-probabilities are compared, and the most tokens of each.
N_WINDOWS = 2
N_TOKENS = 496
# The least cache, and of what one window needs, the share that is given.
KV_CACHE_GIB = 1.0
_CACHE_ROOM = 1.25

# How far the embeddings are changed, in roundings of the dtype: what those of some sixty sublayers add up to.
_ROUNDINGS = 8
_N_DRAWS = 3
# vLLM's mean difference was 0.96 to 1.04 times that of single draws; errors of 3 % in each matrix made it 1.7.
_MOST_TIMES_ROUNDING = 1.25


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
    n_most = compared + vllm_engine.N_GENERATED
    return EngineSettings(
        concurrency=N_WINDOWS,
        dtype="float32",
        max_model_len=n_most,
        kv_cache_gib=_cache_gib(model, n_most),
        enforce_eager=True,
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
    )


def _cache_gib(model: ModelDirectory, n_tokens: int) -> float:
    """For a window in float32: more than the least where every head of a large model has keys and values of its own."""
    language = model.language
    if not getattr(language, "num_attention_heads", None):
        return KV_CACHE_GIB
    n_bytes = language.num_hidden_layers * cached_numbers(language) * 4 * n_tokens
    return max(KV_CACHE_GIB, _CACHE_ROOM * n_bytes / 2**30)


def claim(name: str, model: ModelDirectory, held_out: Tensor, settings: Prove) -> Claim:
    """Compare log-probabilities on held-out windows and on what vLLM generates after them: in float32, where vLLM
    multiplies the weights in it. transformers has quantised weights dequantised, and rounds their inputs as vLLM does.

    Args:
        name: of the claim.
        held_out: token ids, (samples, tokens).

    Raises:
        RuntimeError: vLLM is missing or failed.
        ValueError: its tokenizer makes other tokens.
    """
    compared = engine_settings(model, held_out.shape[1], settings)
    tolerance = settings.log_probability_tolerance
    quantisation = model.settings.get(QUANTISATION)
    rounded = quantisation is not None and rounds_inputs(quantisation)
    if quantisation is not None:
        tolerance = settings.quantised_tolerance
        device = device_of("auto")
        if device.type != "cpu" or not rounded:  # such kernels take no float32
            able = device.type == "cpu" or dtype_of("auto", device) == torch.bfloat16
            compared = compared.model_copy(update={"dtype": "bfloat16" if able else "float16"})
    windows = held_out[:N_WINDOWS, : compared.max_model_len - vllm_engine.N_GENERATED].tolist()
    alone = compared.tensor_parallel_size * compared.pipeline_parallel_size == 1
    with vllm_engine.engine(model.path, compared, one_process=alone) as engine:
        served = engine.continuations(windows)
        if model.has_tokenizer:
            expected, where = tokenizer_files.sample(model.tokenizer), f"vLLM loads the tokenizer in {model}"
            tokenizer_files.check_sample(expected, engine.tokenizer_sample(), where)
    loaded = load(model, torch.float32, device_of(settings.device), weights_gib=settings.weights_gib)
    n_tokens = sum(len(c.tokens) for c in served)
    if rounded:
        mean, by_rounding = mean_difference(served, loaded, compared.dtype)
        limit = _MOST_TIMES_ROUNDING * by_rounding + settings.log_probability_tolerance
        return Claim(
            name=name,
            statement="vLLM's log-probabilities are as near those of transformers as rounding leaves transformers' own",
            holds=mean <= limit,  # false for NaN
            figures={"mean_logprob_difference": mean, "logprob_rounding": by_rounding, "n_tokens": n_tokens},
            limit=limit,
        )
    difference = vllm_engine.largest_difference(served, loaded)
    return Claim(
        name=name,
        statement="vLLM's log-probabilities are those of transformers",
        holds=difference <= tolerance,  # false for NaN
        figures={"max_logprob_difference": difference, "n_tokens": n_tokens},
        limit=tolerance,
    )


def mean_difference(served: Sequence[Continuation], model: PreTrainedModel, dtype: str) -> tuple[float, float]:
    """Mean differences of log-probabilities, nats: vLLM's from transformers', and transformers' from its own where the
    embeddings are rounded otherwise.

    Args:
        dtype: that vLLM computes in.
    """
    expected = vllm_engine.log_probabilities_by(model, served)
    relative = _ROUNDINGS * torch.finfo(getattr(torch, dtype)).eps
    random = torch.Generator().manual_seed(0)

    def rounded(module: nn.Module, given: tuple[Tensor, ...], states: Tensor) -> Tensor:
        noise = torch.randn(states.shape, generator=random).to(states)
        return states * (1 + relative * noise)

    hook = model.get_input_embeddings().register_forward_hook(rounded)
    try:
        others = [vllm_engine.log_probabilities_by(model, served) for _ in range(_N_DRAWS)]
    finally:
        hook.remove()
    mean = (vllm_engine.log_probabilities(served) - expected).abs().mean().item()
    return mean, torch.stack([(other - expected).abs().mean() for other in others]).mean().item()
