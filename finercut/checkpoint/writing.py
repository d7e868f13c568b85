"""Writes the checkpoint of a whole model less some sublayers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from finercut.model import modeling_finercut, tokenizer_files
from finercut.model.checks import stores_differing_ties
from finercut.model.configs import FLOATS
from finercut.model.directory import DTYPES, ModelDirectory, one_line_errors, quiet
from finercut.model.families import (
    LAYOUT_KEY,
    Layout,
    auto_class,
    base_architecture,
    check_supported,
    is_declared,
    layout_of,
)
from finercut.model.loading import load_pruned, load_whole
from finercut.model.remote_code import code_sha256, note_trusted, pruned_class
from finercut.model.tensors import copy_tensors, is_weights
from finercut.sublayers import Sublayer

MODELING_FILE = Path(modeling_finercut.__file__)
# Written here; every other file that is no weights, of whatever form, is copied.
_REWRITTEN = {"config.json", "README.md", MODELING_FILE.name}
# What is written at once: safetensors' own writer copies it in memory.
_SHARD = "2GB"


def write_pruned(
    model: ModelDirectory | Path | str, removed: Sequence[Sublayer], directory: Path, origin: dict[str, Any], card: str
) -> None:
    """Write the checkpoint of the whole model less `removed` into an empty directory.

    It loads with finercut imported, or with `trust_remote_code=True` through the one file it carries; transformers
    alone refuses it. The checkpoint of a model with code of its own carries that code too, and loads in the second way
    only. Blocks keep the numbers they have in the whole model.

    Args:
        removed: in the order of removal.
        origin: JSON values for config.json's `finercut` section: source, revision, hashes, divergence, lineage.
        card: README.md, the model card.

    Raises:
        ValueError: nothing or every attention would go, or the model's family is not known.
    """
    source = ModelDirectory.of(model).written_by("fetch")
    check_supported(source.config)
    pruned = write_all_but_weights(source, removed, directory, origin)
    stored = as_stored(pruned, pruned.state_dict())
    if all(name in source.tensors and source.tensors[name].shape == tensor.shape for name, tensor in stored.items()):
        copy_tensors(source.path, stored, directory)
    else:
        # Its files have other names for the weights than transformers gives them.
        whole = load_whole(source, getattr(torch, source.dtype, "auto"))
        _keep_stored_dtypes(whole, source)
        # Experts that files hold together are views of one tensor, which are not saved.
        tensors = {name: _alone(tensor) for name, tensor in as_stored(pruned, whole.state_dict()).items()}
        save_torch_state_dict(tensors, directory, max_shard_size=_SHARD)
    (directory / "README.md").write_text(card, encoding="utf-8")


def write_all_but_weights(
    source: ModelDirectory, removed: Sequence[Sublayer], directory: Path, origin: dict[str, Any]
) -> PreTrainedModel:
    """Write what `write_pruned` writes, less weights and card: what later stages, transformers and vLLM know a pruned
    model by.

    Returns:
        The pruned model, without memory for its weights.

    Raises:
        ValueError: as `write_pruned`; or transformers does not save such a config.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(source.config)
    if not is_declared(config):
        setattr(config, LAYOUT_KEY, layout_of(load_whole(source).config).to_dict())
    if source.dtype in FLOATS:
        config.dtype = getattr(torch, source.dtype)  # whatever its file says
    if stores_differing_ties(source):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with one_line_errors(f"transformers makes no model of the config in {source}"):
        whole = auto_class(config).from_pretrained(
            source.path,
            config=config,
            device_map="meta",
            local_files_only=True,
            trust_remote_code=source.trusted,
            ignore_mismatched_sizes=True,
        )
    if source.trusted:
        model_class = pruned_class(whole, source.path, directory)
    else:
        model_class = getattr(modeling_finercut, modeling_finercut.PREFIX + base_architecture(config))
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)
    settings = pruned_config(model_class, config, layout_of(config), removed, origin)
    with torch.device("meta"):
        pruned = model_class(settings)
    if config.get_text_config() is not config:
        # What lies around a language model has several names in files: they stay what they are.
        pruned._weight_conversions = whole._weight_conversions
    with one_line_errors(f"transformers does not save the config of {source} without {removed[0]}"):
        settings.save_pretrained(directory)
    # The whole model's own; where it has a file, that is copied below.
    if whole.can_generate():
        whole.generation_config.to_json_file(directory / "generation_config.json")
    for file in source.path.iterdir():
        if file.is_file() and file.name not in _REWRITTEN and not is_weights(file.name):
            shutil.copyfile(file, directory / file.name)
    if source.trusted:
        note_trusted(directory, code_sha256(directory))
    if source.has_tokenizer:
        tokenizer_files.write(source.tokenizer, directory)
    return pruned


def as_stored(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` that transformers stores of `model`, by their names in files."""
    once = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once.keys()
    names = model.state_dict().keys() - tied - set(model._keys_to_ignore_on_save or ())
    return revert_weight_conversion(model, {name: tensor for name, tensor in tensors.items() if name in names})


def _keep_stored_dtypes(model: PreTrainedModel, source: ModelDirectory) -> None:
    """Give the weights of `model` the dtypes that they have in the files of `source`.

    All are loaded in one; files may have several, such as norms in float32 among bfloat16, and leave out the prefix
    that the class with a head has.
    """
    loaded = dict(model.named_parameters()) | dict(model.named_buffers())
    for stored_name, stored in source.tensors.items():
        name = stored_name if stored_name in loaded else f"{model.base_model_prefix}.{stored_name}"
        dtype = getattr(torch, DTYPES.get(stored.dtype, ""), None)
        if name in loaded and dtype not in (None, loaded[name].dtype):
            loaded[name].data = source.tensor(stored_name)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _save(model: PreTrainedModel, directory: Path) -> None:
    """Save weights and config, without the generation settings: saving refuses some that loading takes, such as a
    padding token of -1.
    """
    model.generation_config = GenerationConfig()
    with quiet():
        model.save_pretrained(directory, max_shard_size=_SHARD)
    (directory / "generation_config.json").unlink(missing_ok=True)


def write_tuned(parent: ModelDirectory, parameters: Mapping[str, Tensor], directory: Path) -> None:
    """Write a pruned checkpoint again with some parameters replaced, rounded to the dtype they are stored in.

    Args:
        parameters: by their names in the model.
        directory: empty.
    """
    model = load_pruned(parent)
    _keep_stored_dtypes(model, parent)
    for name, value in parameters.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter.dtype)
    _save(model, directory)
    for file in parent.path.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, directory / file.name)


def differing_tensors(one: ModelDirectory, other: ModelDirectory) -> list[str]:
    """Names of the stored tensors that are not the same bit for bit, sorted.

    Raises:
        ValueError: names, shapes or dtypes differ.
    """
    if one.tensors != other.tensors:
        odd = sorted(dict(one.tensors.items() ^ other.tensors.items()))
        raise ValueError(f"{one} and {other} differ in name, shape or dtype of {', '.join(odd[:3])} ({len(odd)})")
    return sorted(name for name in one.tensors if not _equal(one.tensor(name), other.tensor(name)))


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def pruned_config(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    layout: Layout,
    removed: Sequence[Sublayer],
    origin: dict[str, Any],
) -> PreTrainedConfig:
    """The config of the pruned model: the whole one's `config`, the skipped sublayers, and the model's origin.

    Args:
        model_class: of the pruned model.
    """
    if not removed:
        raise ValueError("nothing to remove")
    language = config.get_text_config()
    blocks: dict[str, dict[str, Any]] = {str(i): of for i, of in modeling_finercut.own_settings(language).items()}
    for sublayer in sorted(removed):
        blocks.setdefault(str(sublayer.block), {}).setdefault("skip", []).append(sublayer.kind)
    config_class = model_class.config_class
    # As it is saved: some parts of configs refuse what `to_dict` has beside that (DBRX).
    settings = config.to_diff_dict()
    # Sampling settings among them, as older models have: transformers takes them when it loads a config, and refuses to
    # save one with them. They are in the generation config.
    misplaced = config._get_generation_parameters()
    for name in ("model_type", "transformers_version", "per_layer_config", LAYOUT_KEY, *misplaced):
        settings.pop(name, None)
    settings["architectures"] = [model_class.__name__]
    file = model_class.__module__.rpartition(".")[2]
    # By that of causal models too: language models inside others answer to text alone.
    autos = {"AutoModelForCausalLM", auto_class(config).__name__}
    settings["auto_map"] = {
        "AutoConfig": f"{file}.{config_class.__name__}",
        **dict.fromkeys(sorted(autos), f"{file}.{model_class.__name__}"),
    }
    settings["finercut"] = {"layout": layout.to_dict(), **origin, "removals": [str(s) for s in removed]}
    # Where the language model is inside another, its own part of the config says what it lacks.
    part = settings if language is config else settings[next(n for n, of in vars(config).items() if of is language)]
    part["per_layer_config"] = blocks
    return config_class(**settings)
