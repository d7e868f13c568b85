"""Checkpoints whose matrices are rounded to the nearest number here, without llm-compressor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from finercut.checkpoint import quantise
from finercut.checkpoint.settings import Quantise, Quantised

VALID = {"n_samples": 4, "max_divergence_rise": 0.05, "device": "cpu", "ignore": [], "group_size": None}
LARGEST = {"w8a8": 127, "w7a8": 63, "w4a16": 7, "fp8": 448}


def settings(scheme: str = "w8a8", method: str = "rtn", **changes: object) -> Quantised:
    return TypeAdapter(Quantise).validate_python(VALID | {"method": method, "scheme": scheme} | changes)


def quantise_by_hand(directory: Path, chosen: Quantised) -> dict[str, torch.Tensor]:
    """Rewrite a checkpoint; returns what each of its matrices stands for."""
    file, meant = directory / "model.safetensors", {}
    stored = load_file(file)
    for name in [name for name, tensor in stored.items() if "proj" in name and tensor.dim() == 2]:
        new, meant[name] = _store(name, stored.pop(name), chosen.scheme)
        stored |= new
    save_file({n: t.contiguous() for n, t in stored.items()}, file, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantise.quantization_config(chosen)
    (directory / "config.json").write_text(json.dumps(config))
    return meant


def _store(name: str, weight: torch.Tensor, scheme: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors in the file, and the matrix they stand for."""
    if scheme == "w4a16":  # groups of 32 columns
        groups = weight.reshape(len(weight), -1, 32)
        scale = groups.abs().amax(-1, keepdim=True) / LARGEST[scheme]
        numbers = (groups / scale).round().reshape(weight.shape).long()
        packed = sum((numbers[:, i::8] + 8) << (4 * i) for i in range(8))
        packed = torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32)
        stored = {f"{name}_packed": packed, f"{name}_shape": torch.tensor(weight.shape)}
        meant = (numbers.reshape(groups.shape) * scale).reshape(weight.shape)
        return stored | {f"{name}_scale": scale[..., 0]}, meant
    dtype = torch.float8_e4m3fn if scheme == "fp8" else torch.int8
    scale = weight.abs().amax(1, keepdim=True) / LARGEST[scheme]
    numbers = weight / scale
    numbers = (numbers if scheme == "fp8" else numbers.round()).to(dtype)
    return {name: numbers, f"{name}_scale": scale}, numbers.float() * scale
