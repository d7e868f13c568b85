"""Makes a fetched model's config.json say what the model is, where it says something else.

transformers and vLLM take it at its word in different places: a pruned model would have another dtype than the whole
one, or one matrix where the whole one has two.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

from finercut.model import tokenizer_files
from finercut.model.checks import check_model, stores_differing_ties, tied_names
from finercut.model.configs import FLOATS, QUANTISATION, note, read_object, write_object
from finercut.model.directory import ModelDirectory
from finercut.model.families import base_architecture
from finercut.model.layouts import note_layout
from finercut.model.tensors import rename

logger = logging.getLogger("finercut")

# How a program runs a model, and what every stage expects of that: other values break stages, or slow them.
_OF_A_RUN = {
    "return_dict": True,
    "use_return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "use_cache": True,
    "attn_implementation": None,
    "_attn_implementation": None,
}


def settle(directory: Path, name: str) -> ModelDirectory:
    """Check the model in `directory`, and write what later stages and other programs would otherwise guess.

    Args:
        name: under which transformers would load it: the repository's, or a path.

    Raises:
        ValueError: something is missing, cannot be read or does not belong to the rest.
    """
    settle_run(ModelDirectory(directory))
    settle_dtype(ModelDirectory(directory))
    check_model(ModelDirectory(directory))
    settle_architecture(ModelDirectory(directory))
    settle_ties(ModelDirectory(directory))
    tokenizer_files.write(tokenizer_files.effective(ModelDirectory(directory), name), directory)
    return note_layout(ModelDirectory(directory))


def settle_run(model: ModelDirectory) -> None:
    """Take out of config.json how a program ran the model, and a quantization_config of nothing."""
    file = model.path / "config.json"
    settings = read_object(file)
    kept = _without_run(settings)
    if kept != settings:
        logger.info("config.json says how a program ran the model; that is left out")
        write_object(file, kept)


def _without_run(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if value == _OF_A_RUN.get(key, value)}
    if not kept.get(QUANTISATION):
        kept.pop(QUANTISATION, None)
    return {key: _without_run(v) if key.endswith("_config") and isinstance(v, dict) else v for key, v in kept.items()}


def settle_dtype(model: ModelDirectory) -> None:
    """Write the dtype most of the weights are stored as into config.json, where that says another or none."""
    file, stored = model.path / "config.json", model.dtype
    settings = read_object(file)
    said = settings.get("dtype", settings.get("torch_dtype"))
    if stored not in FLOATS or said == stored:
        return
    if said is not None:
        logger.warning("the weights are stored in %s, config.json says %s: taken as they are stored", stored, said)
    settings = {key: value for key, value in settings.items() if key != "torch_dtype"}
    write_object(file, settings | {"dtype": stored})


def settle_architecture(model: ModelDirectory) -> None:
    """Write the class that is pruned into config.json, where that names none or one that writes no text: vLLM would
    take the model for one of embeddings.
    """
    said, kind = model.settings.get("architectures") or [], model.config.model_type
    mappings = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    if model.trusted or any(name in mapping.values() for name in said for mapping in mappings):
        return
    name = base_architecture(model.config)
    logger.warning("config.json names %s as the %s model's class: taken as %s", said or "nothing", kind, name)
    note(model.path, "architectures", [name])


def settle_ties(model: ModelDirectory) -> None:
    """Write into config.json that embeddings and output matrix are two, where the files hold two that differ.

    Where they hold one, it gets the embeddings' name.
    """
    for other, name in tied_names(model).items():
        if other in model.tensors and name not in model.tensors:
            rename(model.path, other, name)
            return
    if not stores_differing_ties(model):
        return
    logger.warning("config.json ties the output matrix to the embeddings; both are stored and differ: both are taken")
    file = model.path / "config.json"
    settings = read_object(file) | {"tie_word_embeddings": False}
    of_language = [name for name, part in vars(model.config).items() if part is model.language]
    inner = {
        key: value | {"tie_word_embeddings": False}
        for key, value in settings.items()
        if isinstance(value, dict) and ("tie_word_embeddings" in value or key in of_language)
    }
    write_object(file, settings | inner)
