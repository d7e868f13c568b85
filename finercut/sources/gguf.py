"""Dequantises the model in a GGUF file."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finercut.sources.gguf_tokenizer import INSTEAD, as_the_file_says, is_of_tokenizer, put_first_and_last
from finercut.system.settings import Dtype

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("finercut")

# Plain text on which a model predicts better with BOS first, or without: whichever it was trained on.
_TRIAL = (
    "The river rises in the mountains of the north and runs through three countries before it meets the sea. In the "
    "spring the snow melts and the water is high; by the end of summer a man can walk across it in many places."
)


def dequantise(gguf: Path, dtype: Dtype, directory: Path) -> None:
    """Write the model in a GGUF file as safetensors, with its tokenizer.

    Raises:
        ValueError: the file is damaged, holds no such model, or model or tokenizer do not come out as the file says.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from finercut.model import tokenizer_files
    from finercut.model.directory import one_line_errors

    with one_line_errors(f"{gguf.name} is not a GGUF file of a model, or is damaged"):
        reader = GGUFReader(gguf)
        metadata = {name: field.contents() for name, field in reader.fields.items() if is_of_tokenizer(name)}
        model, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    _check_complete(model, info["missing_keys"], reader, gguf.name)
    _check_range(model, dtype, gguf.name)
    _scale_rotation(model, reader, gguf.name)
    _settle_sizes(model, reader, gguf.name)
    as_the_file_says(tokenizer, metadata, model.config.model_type, gguf.name)
    if metadata.get("tokenizer.ggml.add_bos_token") is None:
        with one_line_errors(f"{gguf.name} does not run as transformers' {model.config.model_type} model"):
            _try_bos(model, tokenizer, gguf.name)
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if len(ends := list(dict.fromkeys(end for end in ends if end is not None))) > 1:
        model.generation_config.eos_token_id = ends
    model.save_pretrained(directory)
    tokenizer_files.write(tokenizer, directory)


def _check_complete(model: PreTrainedModel, missing: Sequence[str], reader: GGUFReader, where: str) -> None:
    """transformers fills what it does not find with random numbers, and drops what it has no place for.

    Raises:
        ValueError: it did one of them.
    """
    if missing:
        raise ValueError(f"{where} lacks {min(missing)} ({len(missing)} tensors so): {INSTEAD}")
    n_blocks, tied = model.config.num_hidden_layers, model.config.tie_word_embeddings
    found = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors if not tensor.name.startswith("rope_")}
    for name in list(found):
        block = re.match(r"blk\.(\d+)\.", name)  # of several tokens at once, some models predict in a block more
        if (block and int(block[1]) >= n_blocks) or (tied and name == "output.weight"):
            del found[name]
    n_more = sum(found.values()) - sum(parameter.numel() for parameter in model.parameters())
    if n_more > 0:
        raise ValueError(
            f"{where} has {n_more} numbers in its tensors that transformers' {model.config.model_type} model has no "
            f"place for: {INSTEAD}"
        )


def _said(reader: GGUFReader) -> dict[str, Any]:
    """What the file says of the model of its architecture."""
    prefix = f"{reader.fields['general.architecture'].contents()}."
    return {name.removeprefix(prefix): f.contents() for name, f in reader.fields.items() if name.startswith(prefix)}


def _check_range(model: PreTrainedModel, dtype: Dtype, where: str) -> None:
    """
    Raises:
        ValueError: the dtype cannot hold the file's numbers.
    """
    if beyond := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        hint = "set fetch.source.dtype to bfloat16" if dtype == "float16" else "the file is damaged"
        raise ValueError(f"{where} has numbers in {beyond[0]} that are not finite in {dtype}: {hint}")


def _settle_sizes(model: PreTrainedModel, reader: GGUFReader, where: str) -> None:
    """Write into the config what of the forward the file says and transformers takes from its own defaults.

    Raises:
        ValueError: the config has no place for it.
    """
    said, config = _said(reader), model.config
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if said.get(name) is not None and hasattr(config, name):
            setattr(config, name, said[name])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rotated, expected = said.get("rope.dimension_count"), head * rope.get("partial_rotary_factor", 1.0)
    if rotated in (None, expected, getattr(config, "qk_rope_head_dim", None)):
        return
    if "partial_rotary_factor" not in rope:
        raise ValueError(f"{where} rotates {rotated} of {head} numbers of a head, {config.model_type} all: {INSTEAD}")
    config.rope_parameters = rope | {"partial_rotary_factor": rotated / head}


def _scale_rotation(model: PreTrainedModel, reader: GGUFReader, where: str) -> None:
    """Write into the config how the file scales rotary embeddings, which transformers reads of few architectures.

    Raises:
        ValueError: it does in a way that is not known.
    """
    of_all, prefix = _said(reader), "rope.scaling."
    said = {name.removeprefix(prefix): value for name, value in of_all.items() if name.startswith(prefix)}
    if not said and "rope.scale_linear" in of_all:  # as files had it before they named the type
        said = {"type": "linear", "factor": of_all["rope.scale_linear"]}
    tensors = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name.startswith("rope_")}
    config = model.config
    scaled = getattr(config, "rope_parameters", None) or {}
    # Models with windows have settings for each type of attention; those without a window are the ones scaled.
    rope = scaled.get("full_attention", scaled)
    if rope.get("rope_type") != "default":
        return
    kind, factor = said.get("type", "none"), said.get("factor", 1.0)
    known = {"type", "factor", "original_context_length", "finetuned"}
    found: dict[str, Any] | None = None
    if "rope_freqs.weight" in tensors and rope is scaled:
        kind, found = "rope_freqs", _llama3(config, tensors["rope_freqs.weight"])
    elif any(name.startswith("rope_factors") for name in tensors):
        kind = "longrope"
    elif kind == "none" or (kind in ("linear", "yarn") and factor in (0.0, 1.0)):
        return
    elif kind == "linear":
        found = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and said.keys() <= known and "original_context_length" in said:
        original = said["original_context_length"]
        found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if found is None:
        raise ValueError(f"{where} scales rotary embeddings in a way ({kind}) that is not known: {INSTEAD}")
    settings = rope | found
    config.rope_parameters = settings if rope is scaled else scaled | {"full_attention": settings}


def _llama3(config: PreTrainedConfig, divisors: Any) -> dict[str, Any] | None:
    """Llama 3's settings that divide frequencies so; none for frequencies as they are. None if none do."""
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if np.allclose(divisors, 1):
        return {}
    found = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, trial = copy.deepcopy(config), copy.deepcopy(config)
    plain.rope_parameters = config.rope_parameters | found | {"factor": 1.0}
    trial.rope_parameters = config.rope_parameters | found
    frequencies, scaled = (ROPE_INIT_FUNCTIONS["llama3"](of, "cpu")[0].numpy() for of in (plain, trial))
    return found if np.allclose(frequencies / scaled, divisors, rtol=1e-3) else None


def _try_bos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Where the file does not say whether BOS comes first, put it there if the model predicts much better so."""
    if tokenizer.bos_token_id is None or tokenizer.bos_token_id >= model.config.get_text_config().vocab_size:
        return
    ids = tokenizer(_TRIAL, add_special_tokens=False).input_ids
    bare, led = (_nats(model, start, ids) for start in ([], [tokenizer.bos_token_id]))
    is_led = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    better = led < bare if abs(led - bare) > _MARGIN else is_led
    logger.info("%s does not say whether BOS comes first: %.2f nats a token with it, %.2f without", where, led, bare)
    if better != is_led:
        logger.warning(
            "%s: BOS %s, since the model predicts better so", where, "is put first" if better else "is left out"
        )
        put_first_and_last(tokenizer, better, tokenizer("x").input_ids[-1:] == [tokenizer.eos_token_id])


_MARGIN = 0.2
"""Nats a token: less than that may be by chance on so short a text."""


def _nats(model: PreTrainedModel, start: Sequence[int], ids: Sequence[int]) -> float:
    """Mean over the tokens of `ids` but the first."""
    import torch

    tokens = torch.tensor([[*start, *ids]])
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits[0, len(start) : -1].float()
    return torch.nn.functional.cross_entropy(logits, tokens[0, len(start) + 1 :]).item()
