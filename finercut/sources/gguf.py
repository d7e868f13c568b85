"""Dequantises the model in a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finercut.system.settings import Dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        metadata = GGUFReader(gguf)
        split, adds_bos = (metadata.get_field(f"tokenizer.ggml.{name}") for name in ("pre", "add_bos_token"))
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
    if adds_bos is not None and adds_bos.contents():
        _put_bos_first(tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _put_bos_first(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer put its BOS before a text: without it such a model predicts badly."""
    from tokenizers.processors import Sequence, TemplateProcessing

    bos = tokenizer.bos_token
    if bos is None or tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]:
        return
    first = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    present = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = first if present is None else Sequence([present, first])
    # Classes that build their post-processor when they are loaded go by this.
    tokenizer.add_bos_token = True
    tokenizer.init_kwargs["add_bos_token"] = True
