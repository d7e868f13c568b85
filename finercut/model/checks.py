"""Whether a model's files can be read and belong together, found out before anything expensive trusts them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from finercut.model.configs import note, read_object
from finercut.model.families import LAYOUT_KEY, check_supported, is_declared
from finercut.model.remote_code import trusts_code
from finercut.model.tensors import INDEX, safetensors_files, safetensors_shapes

logger = logging.getLogger("finercut")

# What transformers, which takes a file to be right, stumbles over where it is not.
_STUMBLES = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    OSError,
    StrictDataclassError,
)
_FLOATS = {"F64", "F32", "F16", "BF16"}


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' reports on what it loads, and its progress bars, to itself: the caller says what matters."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns whatever a broken file leads to into one line that starts with `what`."""
    try:
        with quiet():
            yield
    except Exception as error:
        # The tokenizers library raises nothing more exact than Exception.
        if not isinstance(error, _STUMBLES) and type(error) is not Exception:
            raise
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"{what}: {type(error).__name__} {told}".strip()) from error


def read_config(directory: Path) -> PreTrainedConfig:
    """The config of the model in `directory`; no code of the model's is run that is not trusted.

    Raises:
        ValueError: it cannot be read, or needs such code.
    """
    read_object(directory / "config.json")
    trusted = trusts_code(directory)
    with explained(f"{directory / 'config.json'} is not a model's config"):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the model in `directory`.

    Raises:
        ValueError: it cannot be read, or makes nothing of a word.
    """
    trusted = trusts_code(directory)
    with explained(f"the tokenizer in {directory} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
        n_tokens = len(tokenizer("finercut").input_ids)
    if not n_tokens:
        raise ValueError(f"the tokenizer in {directory} makes no tokens of a word: its files do not belong together")
    return tokenizer


def check_model(directory: Path) -> PreTrainedConfig:
    """Read config, tokenizer and weights as every later stage will, and compare them with each other.

    A family nobody declared is run to find its sublayers, and they are noted in its config.json for the later stages.

    Returns:
        transformers' config of the language model.

    Raises:
        ValueError: something is missing, cannot be read, or does not belong to the rest; or the sublayers of an
            undeclared family are not found.
    """
    for file in sorted(directory.glob("*.json")):
        read_object(file)
    config = read_config(directory)
    read_tokenizer(directory)
    language = config.get_text_config()
    for name in ("num_hidden_layers", "vocab_size", "max_position_embeddings"):
        value = getattr(language, name, None)
        if not isinstance(value, int):
            raise ValueError(
                f"the config of this {language.model_type} model gives no {name}: finercut does not know its kind"
            )
        if value < 1:
            raise ValueError(f"the model's config gives {name} = {value}")
    _check_index(directory)
    _check_weights(directory, config, language.num_hidden_layers)
    _check_finite(directory)
    check_supported(language)
    if not is_declared(language):
        _note_layout(directory)
    return language


def _check_index(directory: Path) -> None:
    index = directory / INDEX
    if not index.is_file():
        return
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict):
        raise ValueError(f"{INDEX} has no weight_map")
    shards = {file.name for file in safetensors_files(directory)}
    if strangers := sorted(str(shard) for shard in named.values() if shard not in shards):
        raise ValueError(f"{INDEX} names {strangers[0]!r}, which is not a shard of the model")
    if missing := sorted(named.keys() - safetensors_shapes(directory).keys()):
        raise ValueError(f"{len(missing)} tensors of {INDEX} are in no shard, the first is {missing[0]}")


def _check_weights(directory: Path, config: PreTrainedConfig, n_blocks: int) -> None:
    """The weights are those that the config asks for: names and shapes, without reading a tensor."""
    stored = safetensors_shapes(directory)
    if n_blocks > len(stored):
        raise ValueError(f"the weights do not fit the config: {n_blocks} blocks, and {len(stored)} tensors in all")
    with explained("the weights do not fit the config, or it describes no model that can be built"):
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            device_map="meta",
            local_files_only=True,
            trust_remote_code=trusts_code(directory),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    expected = model.state_dict().keys()
    blocks = {match[1] for name in expected if (match := re.match(r"(.+?\.)\d+\.", name))}
    unexpected = sorted(found["unexpected_keys"])
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
        raise ValueError(f"the weights do not fit the config: {'; '.join(told)}")
    if unexpected:
        logger.warning("%d tensors are not used, the first is %s", len(unexpected), unexpected[0])


def _check_finite(directory: Path) -> None:
    for file in safetensors_files(directory):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"{name} in {file.name} has numbers that are not finite: the weights are damaged")


def _note_layout(directory: Path) -> None:
    from finercut.model.loading import load_whole  # which reads models by this module

    layout = getattr(load_whole(directory).config, LAYOUT_KEY)
    logger.info("found the sublayers of this undeclared family: %s", json.dumps(layout))
    note(directory, LAYOUT_KEY, layout)
