"""Writes a model's tokenizer as files that make the same tokens wherever they are loaded, and checks that they do.

transformers and vLLM choose a tokenizer's class, and correct a wrong one, by the model's type and the repository's
name. A pruned model has another type, and a fetched one another name. Their files therefore hold the tokenizer as it
turned out, in the one class that nothing corrects.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, TokenizersBackend

from finercut.model.configs import TEMPLATES, read_object
from finercut.model.directory import ModelDirectory, one_line_errors

logger = logging.getLogger("finercut")

CLASS = "TokenizersBackend"

_CONFIG = "tokenizer_config.json"
# What `tokenizer.json` and `tokenizer_config.json` replace. A sentencepiece model stays, for tools that convert it.
_REPLACED = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
# Applied already, or of the loading that made the tokenizer.
_APPLIED = ("auto_map", "fix_mistral_regex", "add_bos_token", "add_eos_token", "is_local", "local_files_only")
# What transformers chooses a tokenizer by in config.json.
_OF_TOKENIZERS = ("model_type", "tokenizer_class", "auto_map", "architectures", "transformers_version")
# Defaults that a class has and its files do not.
_OF_CLASS = ("model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces")

TEXTS = (
    "The river rises in 2023, and in 1999 it rose 12345.67 metres; 3 + 4 = 7.",
    "  two spaces,   three,\ttab\n\nline breaks\r\n and a space at the end ",
    " led by a space",
    "\n1\n\n22\n\n\n333",
    "It's they'll I'M don't; CamelCase snake_case http://a.b/c?d=e#f",
    "naïve café, Ångström; e\u0301 ﬁ ½ ² Ⅷ",
    "Привет, мир! 你好，世界。 こんにちは 안녕하세요 مرحبا नमस्ते ไทย",
    "🙂👩‍👩‍👧 \u00a0\u200b\u3000 \x07",
    "def f(x):\n    return {'a': [x**2, -1]}  # ok\n",
    "<|im_start|>user<|im_end|><s></s>[INST]<bos><eos><pad><unk><think></think><|endoftext|>",
    "a" * 40,
    "",
)
_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "How high is it?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " How high? "},
        {"role": "assistant", "content": "12 m"},
        {"role": "user", "content": "Sure?"},
    ],
)


def effective(model: ModelDirectory, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes of the model where it is published.

    Args:
        name: the repository's, or the path of the directory: transformers corrects tokenizers by it, too.

    Raises:
        ValueError: it cannot be read.
    """
    config = copy.copy(model.config)
    config._name_or_path = name
    with model.one_line_of_its_tokenizer():
        return AutoTokenizer.from_pretrained(
            model.path, config=config, local_files_only=True, trust_remote_code=model.trusted
        )


def write(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write `tokenizer` into the model's `directory` in place of the tokenizer there, and check what was written.

    A tokenizer that is not the tokenizers library's, or whose class is the model's own code, has no such files: those
    that are there stay, and are checked.

    Raises:
        ValueError: the files make other tokens than `tokenizer` does.
    """
    if isinstance(tokenizer, TokenizersBackend) and type(tokenizer).__module__.startswith("transformers."):
        vocabulary = tokenizer.backend_tokenizer.model
        if getattr(vocabulary, "dropout", None):
            logger.warning("the tokenizer drops merges at random, as in its training: that is left out")
            vocabulary.dropout = None
        for name in _REPLACED:
            (directory / name).unlink(missing_ok=True)
        shutil.rmtree(directory / TEMPLATES, ignore_errors=True)
        # One template gets its file; several stay together in the config, which is one file less to lose.
        tokenizer.save_pretrained(directory, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
        file = directory / _CONFIG
        settings = {key: value for key, value in read_object(file).items() if key not in _APPLIED}
        settings |= {key: getattr(tokenizer, key) for key in _OF_CLASS} | {"tokenizer_class": CLASS}
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False, default=_plain)
        file.write_text(text + "\n", encoding="utf-8")
    check(tokenizer, directory)


def check(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """The files in `directory` make the same of every text as `tokenizer`, with finercut and without.

    Raises:
        ValueError: they do not; says of which text.
    """
    model, expected = ModelDirectory(directory), sample(tokenizer)
    check_sample(expected, model.tokenizer, f"transformers loads the tokenizer in {directory}")
    # Without finercut transformers does not know a pruned model's type, and takes what a config is in general. That
    # cannot read everything in a whole model's, whose type it knows.
    with one_line_errors(f"the tokenizer in {directory} cannot be read without finercut"):
        if model.is_pruned:
            config = PreTrainedConfig.from_pretrained(directory, local_files_only=True)
        else:
            config = PreTrainedConfig(**{key: model.settings[key] for key in _OF_TOKENIZERS if key in model.settings})
        plain = AutoTokenizer.from_pretrained(
            directory, config=config, local_files_only=True, trust_remote_code=model.trusted
        )
    check_sample(expected, plain, f"transformers without finercut loads the tokenizer in {directory}")


def check_sample(expected: dict[str, Any], tokenizer: PreTrainedTokenizerBase | dict[str, Any], where: str) -> None:
    """
    Args:
        expected: `sample` of the tokenizer that is right.
        tokenizer: another one, or the sample of it.
        where: for the message, what the other one is.

    Raises:
        ValueError: they differ; says where first.
    """
    found = tokenizer if isinstance(tokenizer, dict) else sample(tokenizer)
    for what, value in expected.items():
        if found.get(what) != value:
            raise ValueError(
                f"{where} so that it differs from the whole model's in {what}: {_short(found.get(what))}, and not "
                f"{_short(value)}. The model cannot be used so; please report its tokenizer's files"
            )


def sample(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer makes of texts, its special tokens and chats, as JSON values by the name of each."""
    special = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    found: dict[str, Any] = {"its special tokens": special, "its number of tokens": len(tokenizer)}
    marks = "x".join(str(token) for token in tokenizer.all_special_tokens)
    added = "x".join(sorted(tokenizer.get_added_vocab())[:200])
    for text in (*TEXTS, marks, f"a {marks} b", added):
        ids = tokenizer(text).input_ids
        found[f"the text {_short(text)}"] = [ids, tokenizer(text, add_special_tokens=False).input_ids]
        found[f"the decoded text {_short(text)}"] = tokenizer.decode(ids)
    template = tokenizer.chat_template
    for name in [None] if template is None or isinstance(template, str) else sorted(template):
        for number, chat in enumerate(_CHATS if template else ()):
            found[f"the chat template {name or ''} with chat {number}"] = _rendered(tokenizer, chat, name)
    return found


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], name: str | None) -> Any:
    options = {"add_generation_prompt": True, "tokenize": False}
    try:
        # Of templates that write the time, how they ask for it.
        return tokenizer.apply_chat_template(chat, chat_template=name, strftime_now=lambda form: form, **options)
    except Exception as error:
        # A template may refuse a chat, with an error of any class: then both must.
        return type(error).__name__


def _plain(value: Any) -> Any:
    return value.__getstate__() | {"__type": "AddedToken"} if isinstance(value, AddedToken) else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
