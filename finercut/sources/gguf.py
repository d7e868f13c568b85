"""Dequantises the model in a GGUF file."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finercut.system.settings import Dtype

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("finercut")

# By the pre-tokenizers' names in GGUF files, as llama.cpp treats them. Each list has what transformers leaves out.
# They split off every digit before the GPT-2 rule: without that, "\n\n1" and spaces before digits are other tokens.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# A piece that is a token stays whole, whatever the merges say; and BOS comes first unless the file says otherwise.
_WHOLE_PIECES = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "tekken",
}
# They have the GPT-2 rule and nothing else; so has a file that names none.
_GPT2 = {"default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "modern-bert", "mellum"}

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
        metadata = {name: field.contents() for name, field in reader.fields.items() if _of_tokenizer(name)}
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
    _scale_rotation(model, reader, gguf.name)
    _as_the_file_says(tokenizer, metadata, gguf.name)
    if metadata.get("tokenizer.ggml.add_bos_token") is None:
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
        raise ValueError(f"{where} lacks {min(missing)} ({len(missing)} tensors so): {_INSTEAD}")
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
            f"place for: {_INSTEAD}"
        )


def _scale_rotation(model: PreTrainedModel, reader: GGUFReader, where: str) -> None:
    """Write into the config how the file scales rotary embeddings, which transformers reads of few architectures.

    Raises:
        ValueError: it does in a way that is not known.
    """
    prefix = f"{reader.fields['general.architecture'].contents()}.rope.scaling."
    said = {name.removeprefix(prefix): f.contents() for name, f in reader.fields.items() if name.startswith(prefix)}
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
        raise ValueError(f"{where} scales rotary embeddings in a way ({kind}) that is not known: {_INSTEAD}")
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


_LONG = ("merges", "scores", "token_type", "precompiled_charsmap")
"""Arrays that transformers reads, and nothing here."""


def _of_tokenizer(name: str) -> bool:
    return name.startswith("tokenizer.") and not name.endswith(_LONG)


def _as_the_file_says(tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any], where: str) -> None:
    """Change `tokenizer` to what the file's metadata says and transformers did not take from there.

    Raises:
        ValueError: it cannot be made so.
    """
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    said = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    kind, split, backend = said.get("model"), said.get("pre") or "default", tokenizer.backend_tokenizer
    if kind == "gpt2":
        if split in _SINGLE_DIGITS:
            backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
        elif split not in _GPT2 and split not in GGUF_PRE_TOKENIZER_SPLITS:
            raise ValueError(
                f"{where} splits text by the rule {split!r}, which transformers does not know, and would come out as "
                "other tokens: take the model in Hugging Face layout"
            )
        if split in _WHOLE_PIECES:
            backend.model.ignore_merges = True
    if kind == "llama" and said.get("add_space_prefix") is False:
        _without_space_prefix(backend)
    tokens = said.get("tokens", ())
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = said.get(f"{key}_token_id", {"bos": 1, "eos": 2, "unk": 0}.get(name) if kind == "llama" else None)
        if number is not None and number < len(tokens) and getattr(tokenizer, f"{name}_token") is None:
            setattr(tokenizer, f"{name}_token", backend.id_to_token(number))
    bos_first = kind == "llama" or (kind == "gpt2" and split in _WHOLE_PIECES)  # where the file does not say
    _put_first_and_last(tokenizer, said.get("add_bos_token", bos_first), said.get("add_eos_token", kind == "t5"))
    if named := metadata.get("tokenizer.chat_templates"):
        templates = {name: metadata[f"tokenizer.chat_template.{name}"] for name in named}
        default = metadata.get("tokenizer.chat_template")
        tokenizer.chat_template = templates | ({"default": default} if default else {})
    _drop_strangers(tokenizer, len(tokens))
    _check_tokens(tokenizer, said, where)


def _drop_strangers(tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> None:
    """Take out the tokens that transformers' classes add to the file's: their numbers are outside the embeddings."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in state["added_tokens"] if token["id"] < n_tokens]
    if len(kept) < len(state["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state | {"added_tokens": kept}))


def _without_space_prefix(backend: Any) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers

    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer.prepend_scheme = "never"
    if isinstance(backend.normalizer, normalizers.Sequence):
        kept = [part for part in backend.normalizer if not isinstance(part, normalizers.Prepend)]
        backend.normalizer = normalizers.Sequence(kept)
    elif isinstance(backend.normalizer, normalizers.Prepend):
        backend.normalizer = None
    # Nor is a space taken off the front of what is decoded.
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])


def _put_first_and_last(tokenizer: PreTrainedTokenizerBase, bos: bool, eos: bool) -> None:
    """Let the tokenizer put its BOS before a text, or not, and its EOS after it."""
    from tokenizers.processors import TemplateProcessing

    first = [(tokenizer.bos_token, tokenizer.bos_token_id)] if bos and tokenizer.bos_token is not None else []
    last = [(tokenizer.eos_token, tokenizer.eos_token_id)] if eos and tokenizer.eos_token is not None else []
    around = [[token for token, _ in first], [token for token, _ in last]]
    one, other = ([f"{piece}:{n}" for piece in (*around[0], text, *around[1])] for n, text in enumerate(("$A", "$B")))
    template = TemplateProcessing(single=one, pair=[*one, *other], special_tokens=[*first, *last])
    tokenizer.backend_tokenizer.post_processor = template


def _check_tokens(tokenizer: PreTrainedTokenizerBase, said: Mapping[str, Any], where: str) -> None:
    """Every token has the number that it has in the file, and so have the special ones.

    Raises:
        ValueError: one has not.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytewise = bytes_to_unicode()
    for number, token in enumerate(said.get("tokens", ())):
        # Gemma's runs of spaces, and special tokens in a byte-level vocabulary, are spelt otherwise.
        spelt = {token, token.replace(" ", "\u2581"), "".join(bytewise[byte] for byte in token.encode())}
        if (found := tokenizer.backend_tokenizer.id_to_token(number)) not in spelt and said.get("model") != "t5":
            raise ValueError(f"token {number} of {where} is {token!r}, and came out as {found!r}: {_INSTEAD}")
    if len(tokenizer) > len(said.get("tokens", ())):
        extra = tokenizer.backend_tokenizer.id_to_token(len(said["tokens"]))
        raise ValueError(f"{where} has no token {extra!r} as it came out: {_INSTEAD}")
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number, found = said.get(f"{key}_token_id"), getattr(tokenizer, f"{name}_token_id")
        if number is not None and number != found:
            raise ValueError(
                f"{where} says that token {number} is its {name.upper()}, it came out as {found}: {_INSTEAD}"
            )


_INSTEAD = "take the model in Hugging Face layout"


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
        _put_first_and_last(tokenizer, better, tokenizer("x").input_ids[-1:] == [tokenizer.eos_token_id])


_MARGIN = 0.2
"""Nats a token: less than that may be by chance on so short a text."""


def _nats(model: PreTrainedModel, start: Sequence[int], ids: Sequence[int]) -> float:
    """Mean over the tokens of `ids` but the first."""
    import torch

    tokens = torch.tensor([[*start, *ids]])
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits[0, len(start) : -1].float()
    return torch.nn.functional.cross_entropy(logits, tokens[0, len(start) + 1 :]).item()
