"""Dequantises the model in a GGUF file."""

from __future__ import annotations

from pathlib import Path

from finercut.system.settings import Dtype

# Pre-tokenizers of GGUF files that split off every digit before the GPT-2 rule, as llama.cpp does; transformers, which
# does not know the name, leaves that out, and "\n\n1" and runs of spaces before digits come out as other tokens.
_SINGLE_DIGITS = {"smollm"}


def dequantise(gguf: Path, dtype: Dtype, directory: Path) -> None:
    """Write the model in a GGUF file as safetensors, with its tokenizer.

    Raises:
        ValueError: the file is damaged, or holds no such model.
    """
    import torch
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from finercut.model.directory import one_line_errors

    with one_line_errors(f"{gguf.name} is not a GGUF file of a model, or is damaged"):
        split = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    if split is not None and split.contents() in _SINGLE_DIGITS:
        rest = tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), rest])
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
