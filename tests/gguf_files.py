"""Models as GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """GGUF keeps the two halves of a rotary head interleaved."""
    return weight.reshape(n_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    file: Path,
    model,
    tokenizer,
    pre: str | None = "smollm",
    *,
    rope=None,
    more=None,
    less=(),
    user_defined=(),
    metadata=None,
    **said: bool,
) -> None:
    """`model` as llama.cpp's converter would write it, its first MLP's last matrix in Q4_1.

    Args:
        rope: metadata of the scaling of its rotary embeddings.
        more, less: tensors that the file has too, and names of those that it lacks.
        user_defined: tokens of that type, after those of the tokenizer.
        metadata: more of the model's, numbers.
        said: flags of the tokenizer's metadata.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    c = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for name, value in (metadata or {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{name}", value)
    for name, value in said.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    for name, value in (rope or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"llama.rope.scaling.{name}", value)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [*sorted(vocabulary["vocab"], key=vocabulary["vocab"].get), *user_defined]
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_token_types([3 if i < 3 else 4 if token in user_defined else 1 for i, token in enumerate(tokens)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if name.endswith("q_proj.weight"):
            values = permuted(values, c.num_attention_heads)
        if name.endswith("k_proj.weight"):
            values = permuted(values, c.num_key_value_heads)
        _, _, block, inside = (*name.split(".", 3), "")[:4]
        short = f"blk.{block}.{GGUF_NAMES[inside.removesuffix('.weight')]}.weight" if block.isdigit() else None
        name_in_gguf = (
            short or {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        )
        if name_in_gguf in less:
            continue
        if name_in_gguf == "blk.0.ffn_down.weight":
            quantised = quants.quantize(values, GGMLQuantizationType.Q4_1)
            writer.add_tensor(name_in_gguf, quantised, raw_dtype=GGMLQuantizationType.Q4_1)
            dequantised = quants.dequantize(quantised, GGMLQuantizationType.Q4_1)
            assert not np.array_equal(dequantised, values)
            tensor.copy_(torch.from_numpy(dequantised))
        else:
            writer.add_tensor(name_in_gguf, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
