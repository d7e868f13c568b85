"""Validates a model directory before anything expensive uses it."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from finercut.model.configs import context_of, read_object
from finercut.model.directory import ModelDirectory, one_line_errors
from finercut.model.families import auto_class, check_supported
from finercut.model.tensors import INDEX, safetensors_files, shards
from finercut.model.tokenizer_files import TEXTS

logger = logging.getLogger("finercut")

_FLOATS = {"F64", "F32", "F16", "BF16"}


def check_model(model: ModelDirectory) -> None:
    """Read config, tokenizer and weights as every later stage will, and compare them with each other.

    Raises:
        ValueError: something is missing, cannot be read, or does not belong to the rest.
    """
    for file in sorted(model.path.glob("*.json")):
        read_object(file)
    language = model.language
    _ = model.tokenizer
    check_sizes(language)
    _check_index(model)
    _check_weights(model)
    _check_vocabulary(model)
    _check_finite(model)
    check_supported(model.config)


def check_sizes(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the config of a language model lacks a size that later stages need, or one of them makes no sense.
    """
    sizes = {name: getattr(config, name, None) for name in ("num_hidden_layers", "vocab_size")}
    for name, value in (sizes | {"max_position_embeddings": context_of(config)}).items():
        if not isinstance(value, int):
            raise ValueError(
                f"the config of this {config.model_type} model gives no {name}: finercut does not know its kind"
            )
        if value < 1:
            raise ValueError(f"the model's config gives {name} = {value}")


def tied_names(model: ModelDirectory) -> dict[str, str]:
    """Tensors that are another one, as the config says, each with the name of the other, which vLLM reads: by their
    names in the files, and by transformers' where the files have none of them."""
    if not any(getattr(config, "tie_word_embeddings", False) for config in (model.config, model.language)):
        return {}
    of = auto_class(model.config)._model_mapping.get(type(model.config), None)
    tied = getattr(of, "_tied_weights_keys", None)
    if not isinstance(tied, dict):
        return {}
    return {_stored_name(model, one): _stored_name(model, other) for one, other in tied.items()}


def _stored_name(model: ModelDirectory, name: str) -> str:
    """Of a tensor whose name in the files may begin otherwise than transformers'."""
    if name in model.tensors:
        return name
    end = ".".join(name.split(".")[-2:])
    found = [stored for stored in model.tensors if f".{stored}".endswith(f".{end}")]
    return found[0] if len(found) == 1 else name


def stores_differing_ties(model: ModelDirectory) -> bool:
    """Whether the files hold two matrices that differ where the config says that they are one. transformers loads both,
    vLLM one of them.
    """
    return any(
        {one, other} <= model.tensors.keys() and _differ(model.tensor(one), model.tensor(other))
        for one, other in tied_names(model).items()
    )


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    exact = torch.promote_types(one.dtype, other.dtype)
    return not torch.equal(one.to(exact), other.to(exact))


def _check_index(model: ModelDirectory) -> None:
    index = model.path / INDEX
    if not index.is_file():
        return
    present = {file.name for file in safetensors_files(model.path)}
    if strangers := sorted(shards(index) - present):
        raise ValueError(f"{INDEX} names {strangers[0]!r}, which is not a shard of the model")
    named = read_object(index)["weight_map"]
    if missing := sorted(named.keys() - model.tensors.keys()):
        raise ValueError(f"{len(missing)} tensors of {INDEX} are in no shard, the first is {missing[0]}")


def _check_weights(model: ModelDirectory) -> None:
    """The weights are those that the config asks for: names and shapes, without reading a tensor."""
    stored, n_blocks = model.tensors, model.language.num_hidden_layers
    if n_blocks > len(stored):
        raise ValueError(f"the weights do not fit the config: {n_blocks} blocks, and {len(stored)} tensors in all")
    with one_line_errors("the weights do not fit the config, or it describes no model that can be built"):
        empty, found = auto_class(model.config).from_pretrained(
            model.path,
            config=model.config,
            device_map="meta",
            local_files_only=True,
            trust_remote_code=model.trusted,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        passed_over = stored.keys() - model.weights.keys()
    expected = empty.state_dict().keys()
    blocks = {match[1] for name in expected if (match := re.match(r"(.+?\.)\d+\.", name))}
    prefix = f"{empty.base_model_prefix}."
    unexpected = sorted(
        name for name in found["unexpected_keys"] if not passed_over & {name, name.removeprefix(prefix)}
    )
    wrong = {
        "missing": sorted(found["missing_keys"]),
        "of another shape": sorted(str(name[0]) for name in found["mismatched_keys"]),
        # Within the blocks every weight counts; beside them there may be parts that a language model does not use.
        "not in the model": [name for name in unexpected if name.startswith(tuple(blocks))],
        "not floating-point numbers": sorted(
            name for name in expected & stored.keys() if stored[name].dtype not in _FLOATS
        ),
    }
    if told := [f"{names[0]} is {what} ({len(names)} so)" for what, names in wrong.items() if names]:
        foreign = _foreign_prefix(stored.keys(), expected)
        advice = f"; their names begin with {foreign!r}, which is not the model's: take that away" if foreign else ""
        raise ValueError(f"the weights do not fit the config: {'; '.join(told)}{advice}")
    if unexpected:
        logger.warning("%d tensors are not used, the first is %s", len(unexpected), unexpected[0])


def _foreign_prefix(stored: Iterable[str], expected: Collection[str]) -> str | None:
    """What most names begin with that a wrapper gave them, such as `module.`."""
    prefixes = Counter(
        name[: -len(rest)]
        for name in stored
        for rest in (name.split(".", n)[-1] for n in range(1, name.count(".")))
        if rest in expected
    )
    prefix, n_names = prefixes.most_common(1)[0] if prefixes else (None, 0)
    return prefix if n_names > len(expected) / 2 else None


def _check_vocabulary(model: ModelDirectory) -> None:
    """The tokens of ordinary text, BOS among them, have embeddings. Special tokens that no text has need none."""
    tokenizer, n_embeddings = model.tokenizer, model.language.vocab_size
    # Embeddings are padded by a few percent, never to twice the vocabulary.
    if len(tokenizer) < n_embeddings / 2:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model {n_embeddings} embeddings: take the tokenizer that "
            "is the model's"
        )
    highest = max(tokenizer(TEXTS[0]).input_ids)
    if highest >= n_embeddings:
        raise ValueError(
            f"the tokenizer makes token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) of ordinary text, the "
            f"model has {n_embeddings} embeddings: take the tokenizer that is the model's"
        )


def _check_finite(model: ModelDirectory) -> None:
    for file in safetensors_files(model.path):
        with safe_open(file, framework="pt") as stored:
            for name in model.weights.keys() & stored.keys():
                tensor = stored.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"{name} in {file.name} has numbers that are not finite: the weights are damaged")
