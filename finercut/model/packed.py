"""Weights that GPTQ, AWQ and bitsandbytes store as packed integers, and the numbers they stand for.

transformers loads such models through packages whose kernels multiply packed integers. Unpacking takes no kernel.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from finercut.model.configs import QUANTISATION, write_object
from finercut.model.directory import ModelDirectory
from finercut.model.families import auto_class
from finercut.model.tensors import INDEX, safetensors_files

Part = Callable[[str], Tensor]
"""Gives a tensor of a quantised matrix by the end of its name."""

_WIDTHS = {"gptq": (2, 4, 8), "awq": (4,)}
_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
METHODS = ("awq", "bitsandbytes", "gptq")
"""As transformers names them."""

# AWQ puts the outputs 0, 2, 4, 6, 1, 3, 5, 7 into a word, beginning with the lowest bits: where each of eight is.
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def check_format(method: str, quantisation: Mapping[str, Any]) -> None:
    """
    Args:
        method: one of METHODS.
        quantisation: `quantization_config` of config.json.

    Raises:
        ValueError: its integers are laid out in a way that is not known.
    """
    if method == "bitsandbytes":
        return
    widths, formats = _WIDTHS[method], _FORMATS[method]
    if (n_bits := quantisation.get("bits", 4)) not in widths:
        raise ValueError(f"of {method}, integers of {' or '.join(map(str, widths))} bits are known, not {n_bits}")
    if (stored := _format(method, quantisation)) not in formats:
        raise ValueError(f"of {method}, the format {' or '.join(formats)} is known, not {stored}")


def _format(method: str, quantisation: Mapping[str, Any]) -> str:
    if quantisation.get("backend") == "llm-awq":
        return "llm-awq"
    named = (quantisation.get(key) for key in ("checkpoint_format", "format", "version"))
    return str(next(filter(None, named), _FORMATS[method][0])).lower()


def unpack(model: ModelDirectory, method: str) -> None:
    """Replace all weights by what they stand for, in bfloat16. A file at a time is in memory.

    Args:
        method: one of METHODS.

    Raises:
        ValueError: a part of a matrix is missing, or none is quantised.
    """
    quantisation = model.settings[QUANTISATION]
    main = "weight" if method == "bitsandbytes" else "qweight"
    matrices = _matrices(model, method)
    if not matrices:
        raise ValueError(f"none is stored as {method} stores it, though config.json says so")
    transposed, known = _names(model)
    unpacked = model.path / "unpacked"
    unpacked.mkdir()
    weight_map: dict[str, str] = {}
    n_bytes = 0
    files = safetensors_files(model.path)
    for file in files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                matrix, part = _split(name)
                if matrix not in matrices or part == "bias":
                    tensor = stored.get_tensor(name)
                    # AutoGPTQ gave every matrix a bias.
                    if matrix in matrices and name not in known and not tensor.any():
                        continue
                elif part == main:
                    name, tensor = f"{matrix}.weight", _weight(model, matrix, method, quantisation)
                    tensor = tensor.T if name in transposed else tensor
                else:
                    continue
                tensors[name] = tensor.to(torch.bfloat16).contiguous() if tensor.is_floating_point() else tensor
        save_file(tensors, unpacked / file.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        n_bytes += sum(tensor.nbytes for tensor in tensors.values())
    # A file is replaced, not written: it may be a link to a cache's.
    for file in files:
        (unpacked / file.name).replace(file)
    unpacked.rmdir()
    if (model.path / INDEX).is_file():
        (model.path / INDEX).unlink()
        write_object(model.path / INDEX, {"metadata": {"total_size": n_bytes}, "weight_map": weight_map})


def _matrices(model: ModelDirectory, method: str) -> set[str]:
    ends = (".SCB", ".weight.absmax") if method == "bitsandbytes" else (".qweight",)
    return {name.removesuffix(end) for name in model.tensors for end in ends if name.endswith(end)}


def _split(name: str) -> tuple[str, str]:
    """The module of a stored tensor, and the rest of its name: bitsandbytes' `weight.absmax` has a dot."""
    matrix, dot, part = name.partition(".weight.")
    if dot:
        return matrix, f"weight.{part}"
    matrix, _, part = name.rpartition(".")
    return matrix, part


def _names(model: ModelDirectory) -> tuple[set[str], set[str]]:
    """The weights that the model, unlike most, holds as (inputs, outputs); and all that it has."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        empty = auto_class(config).from_config(config, trust_remote_code=model.trusted)
    transposed = {f"{name}.weight" for name, module in empty.named_modules() if isinstance(module, Conv1D)}
    return transposed, set(empty.state_dict())


def _weight(model: ModelDirectory, matrix: str, method: str, quantisation: Mapping[str, Any]) -> Tensor:
    """(outputs, inputs) of a quantised matrix, float32."""

    def part(end: str) -> Tensor:
        name = f"{matrix}.{end}"
        if name not in model.tensors:
            raise ValueError(f"{name} is missing")
        return model.tensor(name)

    if method == "awq":
        return _awq(part)
    if method == "gptq":
        group = part("g_idx") if f"{matrix}.g_idx" in model.tensors else quantisation.get("group_size", -1)
        return _gptq(part, group, minus_one=_format(method, quantisation) == "gptq")
    if f"{matrix}.SCB" in model.tensors:
        return _int8(part)
    states = (name for name in model.tensors if name.startswith(f"{matrix}.weight.quant_state."))
    return _codes(part, _split(next(states, f"{matrix}.weight.quant_state"))[1])


def _gptq(part: Part, group: Tensor | int, minus_one: bool) -> Tensor:
    """Words of several inputs of an output. The zero points' words are of several outputs of a group.

    Args:
        group: of each input; or how many inputs that follow one another are a group, all if -1.
        minus_one: whether zero points are stored less one, which is subtracted from whole words, with a borrow.
    """
    zeros, scale = part("qzeros"), part("scales").float()
    n_bits = 32 * zeros.shape[1] // scale.shape[1]
    if minus_one:
        zeros = zeros + sum(1 << shift for shift in range(0, 32, n_bits))
    numbers = _fields(part("qweight").T, n_bits).T
    if isinstance(group, int):
        group = torch.arange(len(numbers)) // (group if group > 0 else len(numbers))
    return ((numbers - _fields(zeros, n_bits)[group]) * scale[group]).T


def _awq(part: Part) -> Tensor:
    """Words of eight outputs of an input, or of a group of inputs."""
    numbers, zeros = (
        _fields(part(end), 4).unflatten(1, (-1, 8))[..., _AWQ_PLACES].flatten(1) for end in ("qweight", "qzeros")
    )
    scale = part("scales").float()
    together = len(numbers) // len(scale)
    return ((numbers - zeros.repeat_interleave(together, 0)) * scale.repeat_interleave(together, 0)).T


def _fields(words: Tensor, n_bits: int) -> Tensor:
    """(rows, words) of 32 bits as (rows, integers), the lowest bits first."""
    if words.dtype != torch.int32 or 32 % n_bits:
        raise ValueError(f"words of {words.dtype} with integers of {n_bits} bits are not known")
    return ((words[..., None] >> torch.arange(0, 32, n_bits)) & (2**n_bits - 1)).flatten(1)


def _int8(part: Part) -> Tensor:
    """bitsandbytes in 8 bits: rows have one scale, which 127 stands for."""
    weight = part("weight")
    if weight.dtype != torch.int8 or part("weight_format").item():
        raise ValueError("of bitsandbytes in 8 bits, int8 by rows (weight_format 0) is known")
    return weight.float() * part("SCB").float()[:, None] / 127


def _codes(part: Part, state: str) -> Tensor:
    """bitsandbytes in 4 bits: indices into a table of 16 numbers, and the largest number of each block, which may be an
    index too, into a table of 256.

    Args:
        state: end of the name of the JSON that says shape and sizes of blocks.
    """
    settings = json.loads(bytes(part(state).tolist()))
    largest = part("weight.absmax")
    if "nested_blocksize" in settings:
        spread = part("weight.nested_absmax").repeat_interleave(settings["nested_blocksize"])[: len(largest)]
        largest = part("weight.nested_quant_map")[largest.long()] * spread + settings["nested_offset"]
    packed = part("weight").flatten().view(torch.uint8)
    codes = torch.stack((packed >> 4, packed & 15), -1).flatten()[: prod(settings["shape"])]
    spread = largest.repeat_interleave(settings["blocksize"])[: len(codes)]
    return (part("weight.quant_map")[codes.int()] * spread).reshape(settings["shape"])
