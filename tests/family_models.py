"""A tiny random model of every family, with each of its options on that changes what happens to the residual stream."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

N_BLOCKS = 4
WINDOW = 6
"""Tokens a sliding window holds; prompts of the tests are longer."""

_LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": WINDOW}
_ROTARY = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
_OPT = {"ffn_dim": 96, "word_embed_proj_dim": 32, "tie_word_embeddings": True}

# By name of the case: model type, and what differs from `_COMMON`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 24, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"use_sliding_window": True, **_LAYER_TYPES, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"use_sliding_window": True, **_LAYER_TYPES, "attention_bias": True, "head_dim": 24}),
    "gemma2": (
        "gemma2",
        {
            **_LAYER_TYPES,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 24,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **_LAYER_TYPES,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
            },
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "phi3": (
        "phi3",
        {"sliding_window": WINDOW, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "use_parallel_residual": True,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_neox sequential": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "n_inner": 96,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
            "tie_word_embeddings": True,
        },
    ),
    "opt": ("opt", {**_OPT, "do_layer_norm_before": True}),
    "opt post-norm": ("opt", {**_OPT, "do_layer_norm_before": False}),
    "mixtral": (
        "mixtral",
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "num_experts": 4,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "attention_bias": True,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
}

# Families nobody declared, for the probe: one norm for both sublayers, MLPs that return routers' scores, additions in
# place.
UNDECLARED: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": ("cohere2", {**_LAYER_TYPES, "logit_scale": 0.5, "tie_word_embeddings": True}),
    "falcon": (
        "falcon",
        {
            "ffn_hidden_size": 96,
            "parallel_attn": True,
            "multi_query": True,
            "bias": True,
            "tie_word_embeddings": True,
        },
    ),
    # With local attention transformers' own whole model writes otherwise with a static cache.
    "gpt_neo": ("gpt_neo", {"num_layers": N_BLOCKS, "attention_types": [[["global"], N_BLOCKS]]}),
    "gpt_oss": ("gpt_oss", {**_LAYER_TYPES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
}

_MIXERS = {"layer_types": ["linear_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "head_dim": 16,
}
_SSM = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
    "mamba_d_conv": 3,
}
_GRANITE = {**_MIXERS, **_SSM, "shared_intermediate_size": 32, "residual_multiplier": 0.4}

# Blocks mix tokens in several ways: attention, linear attention, state space model, short convolution.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": (
        "qwen3_next",
        {**_MIXERS, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1]},
    ),
    "qwen3_5": ("qwen3_5_text", {**_MIXERS, **_DELTA}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 2, **_EXPERTS, "num_dense_layers": 1}),
    "granite 4": ("granitemoehybrid", {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite 4 dense": ("granitemoehybrid", {**_GRANITE, "num_local_experts": 0}),
    "bamba": ("bamba", {"attn_layer_indices": [1, 3], **_SSM}),
    # A block has a state space model beside its attention.
    "falcon_h1": (
        "falcon_h1",
        {
            **_SSM,
            "mamba_d_ssm": 128,
            "ssm_multipliers": [0.5, 2.0, 0.7, 1.3, 0.9],
            "ssm_in_multiplier": 0.8,
            "attention_in_multiplier": 1.2,
        },
    ),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    # A block is one state space model, without an MLP.
    "mamba": ("mamba", {"state_size": 8, "conv_kernel": 3, "use_associative_scan": False}),
    # A cache of its own class, which tells its length by its first layer.
    "minimax": (
        "minimax",
        {
            "layer_types": ["full_attention"] * 2 + ["linear_attention"] * 2,
            "block_size": 8,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", {**_MIXERS, **_DELTA, "linear_num_key_heads": 4}),
    "nemotron_h": (
        "nemotron_h",
        {
            # Each block is one sublayer.
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", *_MIXERS["layer_types"][:2]],
            "num_hidden_layers": 6,
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "use_mamba_kernels": False,
        },
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            **_MIXERS,
            "num_key_value_heads": 4,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}

# Sublayers that add to the stream by themselves; an attention inside another module; multi-head latent attention with
# dense and sparse MLPs; blocks with and without experts and positions in turn; attentions that look at the tokens
# another one chose; several streams, and experts chosen by the ids of the tokens; two blocks in a module, and experts
# that read the stream in the first and add to it behind the second.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),
    "dbrx": (
        "dbrx",
        {
            "d_model": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek_v4": (
        "deepseek_v4",
        {
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
            "mlp_layer_types": ["hash_moe", "moe"] * 2,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "sliding_window": 16,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_topk": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {
            "indexer_types": ["full", "full", "shared", "full"],
            "index_topk": 4,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "mlp_layer_types": ["dense", "sparse"] * 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "longcat_flash": (
        "longcat_flash",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 32,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": WINDOW,
            "head_dim": 16,
        },
    ),
}

_SHARED = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 400,
    "head_dim": 16,
    "attention_bias": True,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
_GEMMA_4 = {**_SHARED, "global_head_dim": 24, "attention_k_eq_v": True, "num_global_key_value_heads": 1}

# Attentions that read the keys and values of others; every block is given something that depends on the tokens.
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": (
        "gemma3n_text",
        {**_SHARED, "laurel_rank": 8, "altup_num_inputs": 3, "activation_sparsity_pattern": [0.9] * 2 + [0.0] * 4},
    ),
    "gemma4": ("gemma4_text", {**_GEMMA_4, "use_double_wide_mlp": True}),
    "gemma4 moe": (
        "gemma4_text",
        {
            **_GEMMA_4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
    ),
    "gemma4_unified": ("gemma4_unified_text", _GEMMA_4 | {"hidden_size_per_layer_input": 0}),
}

# What they do to the residual stream, to the cache or among experts is done by another family here: `make test-matrix`.
ALIKE = {
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "gpt_neox sequential",
    "opt",
    "cohere2",
    "qwen3_5",
    "lfm2_moe",
    "granite 4 dense",
    "bamba",
    "olmo_hybrid",
    "gemma4_unified",
}


def each(names: Iterable[str]) -> list[Any]:
    """Families as parameters of tests."""
    marks = {name: [pytest.mark.matrix] if name in ALIKE else [] for name in names}
    return [pytest.param(name, marks=marks[name], id=name.replace(" ", "-")) for name in names]


_COMMON: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


# Families that call the width of their MLP something else, or have as many key and value heads as query heads.
_OTHERS = {
    "intermediate_size": ("bloom", "dbrx", "deepseek_v4", "falcon", "gpt2", "mamba", "opt"),
    "num_key_value_heads": ("bloom", "dbrx", "deepseek_v4", "falcon", "gpt2", "gpt_neo", "gpt_neox", "opt"),
}


def settings(model_type: str, **changes: Any) -> dict[str, Any]:
    """What a family's config is made from; every name is one that its config class has."""
    usual = {"intermediate_size": 96, "num_key_value_heads": 2}
    return _COMMON | {k: v for k, v in usual.items() if model_type not in _OTHERS[k]} | changes


def random_model(model_type: str, **changes: Any) -> Any:
    """A fresh random model of 4 blocks, norms and biases random too; the same one for the same arguments."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type](**settings(model_type, **changes))
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    # Soft caps and GPT-2's reordered attention exist in this implementation only.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that every sublayer matters.
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return model


def run_without_finercut(code: str, folder: Path, tokens: torch.Tensor, directories: Sequence[Path]) -> str:
    """What `code` prints in a process of its own; it is given a file of the tokens, then the checkpoints."""
    torch.save(tokens, folder / "tokens.pt")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "tokens.pt"), *map(str, directories)],
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
