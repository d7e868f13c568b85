"""Quantised models: which ones can be dequantised, and their weights as bfloat16."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from finercut.model import packed
from finercut.model.configs import QUANTISATION, read_object, write_object
from finercut.model.directory import ModelDirectory, one_line_errors
from finercut.model.families import auto_class
from finercut.model.tensors import INDEX, safetensors_files

# The one is in no config; the other is dequantised on Apple's GPUs.
_NOT_HERE = {"gguf", "metal"}


def method_of(config: PreTrainedConfig) -> str | None:
    """How the weights are quantised, by transformers' name or the config's own; None if they are not."""
    quantisation = _quantisation(config)
    if not quantisation:
        return None
    if not isinstance(quantisation, dict):
        method = getattr(quantisation, "quant_method", quantisation)
    elif quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit"):
        method = "bitsandbytes"
    else:
        method = quantisation.get("quant_method", "by a method that its config does not name")
    return str(getattr(method, "value", method))


def _quantisation(config: PreTrainedConfig) -> Any:
    """What the config says of it, or its language model's part."""
    return getattr(config, QUANTISATION, None) or getattr(config.get_text_config(), QUANTISATION, None)


def methods() -> list[str]:
    """That `dequantise` takes: those that transformers dequantises while it loads weights, and those unpacked here."""
    while_loading = {
        method
        for method, settings in AUTO_QUANTIZATION_CONFIG_MAPPING.items()
        if "dequantize" in inspect.signature(settings).parameters
    }
    return sorted(while_loading - _NOT_HERE | set(packed.METHODS))


def check_dequantisable(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the weights are quantised in a way that cannot be undone here; says which ways can.
    """
    method = method_of(config)
    if method not in methods():
        raise ValueError(f"fetch dequantises {', '.join(methods())}")
    if method in packed.METHODS:
        packed.check_format(method, _quantisation(config))


def dequantise(directory: Path) -> None:
    """Replace the weights of a quantised model by what they stand for, in bfloat16.

    Raises:
        ValueError: they cannot be read, or do not fit the config.
    """
    _say_at_the_top(ModelDirectory(directory))
    model = ModelDirectory(directory)
    with one_line_errors(f"the quantised weights in {directory} cannot be read"):
        if (method := method_of(model.config)) in packed.METHODS:
            packed.unpack(model, method)
        else:
            _load_dequantised(model)
    settings = read_object(directory / "config.json")
    dropped = (QUANTISATION, "torch_dtype")
    kept = {name: value for name, value in settings.items() if name not in dropped}
    write_object(directory / "config.json", kept | {"dtype": "bfloat16"})


def _say_at_the_top(model: ModelDirectory) -> None:
    """Move what the language model's part of config.json says of the quantisation to where all configs have it."""
    settings = model.settings
    for name, part in vars(model.config).items():
        if part is model.language and name in settings and QUANTISATION in settings[name]:
            inner = {key: value for key, value in settings[name].items() if key != QUANTISATION}
            said = settings.get(QUANTISATION) or settings[name][QUANTISATION]
            write_object(model.path / "config.json", settings | {name: inner, QUANTISATION: said})


def _load_dequantised(model: ModelDirectory) -> None:
    """By transformers; the model is in memory meanwhile."""
    _check_scales(model)
    if block := model.settings[QUANTISATION].get("weight_block_size"):
        _complete_grids(model, block)
    directory, config = model.path, model.config
    old = safetensors_files(directory)
    config.quantization_config["dequantize"] = True
    loaded, info = auto_class(config).from_pretrained(
        directory,
        config=config,
        dtype=torch.bfloat16,
        local_files_only=True,
        trust_remote_code=model.trusted,
        output_loading_info=True,
    )
    if wrong := sorted(name for kind in ("missing_keys", "unexpected_keys") for name in info[kind]):
        raise ValueError(f"{wrong[0]} is missing, or not expected ({len(wrong)} so)")
    # One that was loaded would be saved as it was stored.
    with torch.device("meta"):
        plain = type(loaded)(loaded.config)
    names = plain.state_dict().keys()
    plain.load_state_dict({n: t for n, t in loaded.state_dict().items() if n in names}, assign=True)
    plain.save_pretrained(directory / "dequantised")
    # No file is written in place: those of a cache are links to it.
    for file in (*old, directory / INDEX):
        file.unlink(missing_ok=True)
    for file in (directory / "dequantised").glob("model*.safetensors*"):
        file.rename(directory / file.name)
    shutil.rmtree(directory / "dequantised")


def rounds_inputs(quantisation: Mapping[str, Any]) -> bool:
    """Whether matrices that are stored so, by compressed-tensors, have their inputs quantised too."""
    return any(group.get("input_activations") for group in quantisation["config_groups"].values())


def make_plain(model: PreTrainedModel) -> None:
    """Leave of a model that compressed-tensors has dequantised plain matrices, and what vLLM does to their inputs.

    Where inputs are quantised, each token has the scale that takes its largest number to the largest that there is.
    compressed-tensors' own simulation divides by half a step more.

    Raises:
        ValueError: inputs are quantised in another way.
    """
    for name, module in model.named_modules():
        scheme = module.__dict__.pop("quantization_scheme", None)
        if scheme is None:
            continue
        module.__dict__.pop("forward", None)  # compressed-tensors'
        for stored in ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"):
            module._parameters.pop(stored, None)
            module._buffers.pop(stored, None)
        if inputs := scheme.input_activations:
            if not (
                inputs.dynamic is True and inputs.symmetric and inputs.strategy == "token" and inputs.num_bits == 8
            ):
                raise ValueError(f"the inputs of {name} are quantised in a way that is not known: {inputs}")
            module.register_forward_pre_hook(_rounded_integers if inputs.type == "int" else _rounded_floats)


def _rounded_integers(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    states = given[0].float()
    scale = (states.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return ((states / scale).round().mul(scale).to(given[0].dtype), *given[1:])


def _rounded_floats(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    states = given[0].float()
    scale = (states.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    return ((states / scale).to(torch.float8_e4m3fn).float().mul(scale).to(given[0].dtype), *given[1:])


def _check_scales(model: ModelDirectory) -> None:
    """8-bit floating-point weights have scales: transformers would take those that lack theirs as they are."""
    scaled = {name.rpartition(".")[0] for name in model.tensors if "scale" in name}
    for name, stored in model.tensors.items():
        if stored.dtype.startswith("F8") and "scale" not in name and name.rpartition(".")[0] not in scaled:
            raise ValueError(f"{name} has no scale")


def _complete_grids(model: ModelDirectory, block: Sequence[int]) -> None:
    """Repeat the scales of weights whose last block is cut, such as DeepSeek-V3's of 576 rows in blocks of 128:
    transformers takes all blocks of a weight to be of one size.

    Args:
        block: rows and columns that have one scale.
    """
    for file in safetensors_files(model.path):
        tensors = load_file(file)
        changed = {}
        for name, scale in tensors.items():
            weight = model.tensors.get(name.removesuffix("_scale_inv"))
            if not name.endswith("_scale_inv") or weight is None or scale.dim() != 2:
                continue
            for dimension, (size, n_together) in enumerate(zip(weight.shape, block, strict=True)):
                if size % n_together:
                    scale = scale.repeat_interleave(n_together, dimension).narrow(dimension, 0, size)
                    changed[name] = scale.contiguous()
        if changed:
            file.unlink()  # which may be a link to a cache's
            save_file(tensors | changed, file, {"format": "pt"})
