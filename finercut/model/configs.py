"""Reads the JSON files beside a model's weights, and adds keys to config.json for later stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""One of them at least has the tokens of a tokenizer."""
TEMPLATES = "additional_chat_templates"
"""Folder beside config.json: the chat templates that have names."""
QUANTISATION = "quantization_config"
"""Key of config.json under which quantised weights say how they are stored."""
FLOATS = ("bfloat16", "float16", "float32")
"""What models are stored and run in; one that is stored in another dtype is run in what its config says."""
NO_LIMIT = 2**31 - 1
"""Tokens that a model without a limit reads at most."""
# BLOOM's published configs have the last one, which no class of transformers declares.
_CONTEXTS = ("max_position_embeddings", "max_seq_len", "seq_length")


def read_object(file: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it does not hold a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object")
    return content


def context_of(config: Any) -> Any:
    """What the config of a language model says that it reads at most, in tokens, checked or not.

    Returns:
        `NO_LIMIT` where transformers' config of that type has no such setting: models that are recurrent, or that bias
        attentions by distance (ALiBi). None where the config of a model with code of its own has none.
    """
    said = [getattr(config, name) for name in _CONTEXTS if hasattr(config, name)]
    known = any(of.__module__.startswith("transformers.models.") for of in type(config).__mro__)
    return said[0] if said else NO_LIMIT if known else None


def note(directory: Path, key: str, value: Any) -> None:
    """Add `key` to the config.json in `directory`."""
    file = directory / "config.json"
    write_object(file, read_object(file) | {key: value})


def write_object(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as people read it."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
