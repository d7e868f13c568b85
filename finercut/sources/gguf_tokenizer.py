"""Makes the tokenizer of a GGUF file what the file says, where transformers takes something else."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("finercut")

INSTEAD = "take the model in Hugging Face layout"
"""What to do about a file that would come out as another model."""

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

_USER_DEFINED = 4
"""The type of tokens that stand for themselves in any text."""

_LONG = ("merges", "scores", "precompiled_charsmap")
"""Arrays that transformers reads, and nothing here."""


def is_of_tokenizer(name: str) -> bool:
    return name.startswith("tokenizer.") and not name.endswith(_LONG)


def as_the_file_says(
    tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any], model_type: str, where: str
) -> None:
    """Change `tokenizer` to what the file's metadata says and transformers did not take from there.

    Raises:
        ValueError: it cannot be made so.
    """
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    said = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    kind, split, backend = said.get("model"), said.get("pre") or "default", tokenizer.backend_tokenizer
    if kind == "gpt2":
        if split in _SINGLE_DIGITS:
            backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
        elif split not in _GPT2 and split not in GGUF_PRE_TOKENIZER_SPLITS:
            raise ValueError(
                f"{where} splits text by the rule {split!r}, which transformers does not know, and would come out as "
                f"other tokens: {INSTEAD}"
            )
        if split in _WHOLE_PIECES:
            backend.model.ignore_merges = True
        if "pre" not in said:
            logger.warning("%s names no rule by which text is split into words: taken to be GPT-2's", where)
        # No file names a normaliser. transformers gives Qwen's to Qwen2 whatever its files say.
        if str(TOKENIZER_MAPPING_NAMES.get(model_type)).startswith("Qwen"):
            backend.normalizer = NFC()
    if kind == "llama" and said.get("add_space_prefix") is False:
        _without_space_prefix(backend)
    tokens = said.get("tokens", ())
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = said.get(f"{key}_token_id", {"bos": 1, "eos": 2, "unk": 0}.get(name) if kind == "llama" else None)
        if number is not None and number < len(tokens) and getattr(tokenizer, f"{name}_token") is None:
            setattr(tokenizer, f"{name}_token", backend.id_to_token(number))
    bos_first = kind == "llama" or (kind == "gpt2" and split in _WHOLE_PIECES)  # where the file does not say
    put_first_and_last(tokenizer, said.get("add_bos_token", bos_first), said.get("add_eos_token", kind == "t5"))
    if named := metadata.get("tokenizer.chat_templates"):
        templates = {name: metadata[f"tokenizer.chat_template.{name}"] for name in named}
        default = metadata.get("tokenizer.chat_template")
        tokenizer.chat_template = templates | ({"default": default} if default else {})
    # Last, for these put another backend in place of the tokenizer's.
    if kind == "gpt2":
        _keep_whole(tokenizer, said)
    _drop_strangers(tokenizer, len(tokens))
    _check_tokens(tokenizer, said, where)


def _keep_whole(tokenizer: PreTrainedTokenizerBase, said: Mapping[str, Any]) -> None:
    """Let the tokens that the file calls user-defined stand for themselves, such as runs of spaces."""
    from tokenizers import AddedToken, Tokenizer

    backend = tokenizer.backend_tokenizer
    cut = {
        number: token
        for number, (token, kind) in enumerate(zip(said.get("tokens", ()), said.get("token_type", ()), strict=False))
        if kind == _USER_DEFINED and backend.encode(token, add_special_tokens=False).ids != [number]
    }
    if cut:
        # The library takes a token for one of the vocabulary by how it is spelt there, which is byte by byte.
        state = json.loads(backend.to_str())
        vocabulary = state["model"]["vocab"]
        state["model"]["vocab"] = {cut.get(number, token): number for token, number in vocabulary.items()}
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in cut.values()])


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


def put_first_and_last(tokenizer: PreTrainedTokenizerBase, bos: bool, eos: bool) -> None:
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
            raise ValueError(f"token {number} of {where} is {token!r}, and came out as {found!r}: {INSTEAD}")
    if len(tokenizer) > len(said.get("tokens", ())):
        extra = tokenizer.backend_tokenizer.id_to_token(len(said["tokens"]))
        raise ValueError(f"{where} has no token {extra!r} as it came out: {INSTEAD}")
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number, found = said.get(f"{key}_token_id"), getattr(tokenizer, f"{name}_token_id")
        if number is not None and number != found:
            raise ValueError(
                f"{where} says that token {number} is its {name.upper()}, it came out as {found}: {INSTEAD}"
            )
