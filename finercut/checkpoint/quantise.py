"""The step `quantise`: stores the matrices of a checkpoint's blocks in fewer bits, by llm-compressor.

llm-compressor runs in a process of its own with other versions of transformers and compressed-tensors, see
`finercut.system.compressor`. What it writes is read by the versions that are installed here: compressed-tensors, on
which vLLM depends, defines the format.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from finercut.checkpoint import lineage
from finercut.checkpoint.card import quantised_card
from finercut.checkpoint.records import Claim, QuantiseReport
from finercut.checkpoint.settings import Quantised
from finercut.checkpoint.steps import Inputs, Proof
from finercut.healing.fidelity import Fidelity, compare
from finercut.model import modeling_finercut
from finercut.model.configs import QUANTISATION, note, read_object
from finercut.model.devices import device_of
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load
from finercut.model.remote_code import TRUSTED_KEY
from finercut.system import compressor
from finercut.system.machine import interpreter
from finercut.system.processes import end_group, start_group
from finercut.tokens import Tokens, sha256_of

logger = logging.getLogger("finercut")

# Rounded in the dtype of the weights: bfloat16 misses the nearest number by up to a quarter of a step at 127 steps.
_ROUNDING = {"rtn": 1.0, "gptq": 16.0}
"""Most steps between a weight and what it is stored as. gptq does not round to the nearest: it moves later columns."""
# How llm-compressor tells how far it is: `(3/31): Calibrating: 40%`.
_PART = re.compile(r"\((\d+/\d+)\): Calibrating")
_INTEGER = {"type": "int", "symmetric": True, "dynamic": False}
_FLOAT = _INTEGER | {"type": "float"}
_BY_TOKEN = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}


def scheme(settings: Quantised) -> dict[str, Any]:
    """The scheme as compressed-tensors spells it, for llm-compressor."""
    groups: dict[str, Any] = {"strategy": "channel"}
    if settings.group_size is not None:
        groups = {"strategy": "group", "group_size": settings.group_size}
    by_name = {
        "w8a8": (_INTEGER | {"num_bits": 8}, _BY_TOKEN | {"type": "int"}),
        "w7a8": (_INTEGER | {"num_bits": 7}, _BY_TOKEN | {"type": "int"}),
        "fp8": (_FLOAT | {"num_bits": 8}, _BY_TOKEN | {"type": "float"}),
        "w4a16": (_INTEGER | {"num_bits": 4}, None),
    }
    weights, inputs = by_name[settings.scheme]
    return {"targets": ["Linear"], "weights": weights | groups, "input_activations": inputs}


def quantization_config(settings: Quantised) -> dict[str, Any]:
    """What config.json of a checkpoint quantised so says, for those who are asked about it before there is one."""
    formats = {"w8a8": "int-quantized", "w7a8": "int-quantized", "fp8": "float-quantized", "w4a16": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": formats[settings.scheme],
        "quantization_status": "compressed",
        "ignore": _ignored(settings),
        "config_groups": {"group_0": _as_stored(scheme(settings))},
    }


def _as_stored(group: dict[str, Any]) -> dict[str, Any]:
    """A group of a config for those who read it: 7-bit integers are 8-bit ones that vLLM has a kernel for."""
    weights = group["weights"]
    return group | {"weights": weights | {"num_bits": 8 if weights["num_bits"] == 7 else weights["num_bits"]}}


def check_installed() -> str:
    """The version of llm-compressor.

    Raises:
        RuntimeError: it is not installed.
    """
    if version := compressor.installed():
        return version
    raise RuntimeError(
        "llm-compressor is not installed: run `make setup QUANTISE=1`, or set quantise.method to none in params.yaml"
    )


def check_shapes(model: nn.Module, settings: Quantised) -> None:
    """
    Args:
        model: may be without memory for weights.

    Raises:
        ValueError: groups do not divide a matrix, or nothing would be quantised.
    """
    if experts := [name for name, weight in model.named_parameters() if weight.dim() == 3 and "expert" in name]:
        raise ValueError(f"quantise: models with experts, such as {experts[0]}, are not quantised: set method to none")
    linear = {name: m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = [name for name, _ in model.named_modules()]
    for pattern in settings.ignore:
        if not any(_matches(name, [pattern]) for name in names):
            raise ValueError(f"quantise.ignore: no module is called {pattern!r}; one is {next(iter(linear))}")
    taken = {name: n for name, n in linear.items() if not _matches(name, _ignored(settings))}
    if not taken:
        raise ValueError(f"quantise: nothing to quantise: quantise.ignore leaves none of {len(linear)} matrices")
    if size := settings.group_size:
        for name, n_columns in taken.items():
            if n_columns % size:
                fitting = math.gcd(*taken.values())
                raise ValueError(
                    f"quantise.group_size: {size} does not divide the {n_columns} columns of {name}: take a divisor of "
                    f"{fitting}, or null"
                )


def check_own_code(model: ModelDirectory) -> None:
    """
    Raises:
        ValueError: the model runs by Python code of its own.
    """
    if TRUSTED_KEY in model.settings:
        raise ValueError(f"quantise: the model in {model} runs by Python code of its own, which is not quantised")


def apply(parent: ModelDirectory, directory: Path, settings: Quantised, inputs: Inputs) -> QuantiseReport:
    """Write the quantised checkpoint; see `finercut.checkpoint.steps`.

    Raises:
        FileNotFoundError: no tokens, or no whole model.
        ValueError: the model cannot be quantised so, or held-out divergence rises by more than settings allow.
        RuntimeError: llm-compressor is not installed, or failed.
    """
    began, version = time.monotonic(), check_installed()
    check_own_code(parent)
    whole, tokens = inputs.whole.written_by("fetch"), inputs.tokens()
    tokens.check_vocabulary(parent.language.vocab_size)
    check_shapes(_without_weights(parent), settings)
    windows = _windows(tokens, settings.n_samples) if settings.method == "gptq" else None
    written = directory / "llm-compressor"
    _run(parent, written, settings, windows)
    for file in parent.path.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, directory / file.name)
    for file in written.glob("model*.safetensors*"):
        file.rename(directory / file.name)
    stored = read_object(written / "config.json")[QUANTISATION]
    shutil.rmtree(written)
    groups = {name: _as_stored(group) for name, group in stored["config_groups"].items()}
    note(directory, QUANTISATION, stored | {"config_groups": groups})
    fitted = {} if windows is None else {"n_tokens": windows.numel(), "tokens_sha256": sha256_of(windows)}
    made = lineage.entry("quantise", parent, settings.model_dump(mode="json"), **fitted)
    lineage.append(ModelDirectory(directory), made)
    child = ModelDirectory(directory)
    sources = tokens.sources_of("held_out")
    before, after = compare(whole, [parent, child], tokens.held_out, sources, device_of(settings.device))
    _check_rise(before, after, settings)
    if (readme := directory / "README.md").is_file():
        text = quantised_card(readme.read_text(encoding="utf-8"), settings, before, after)
        readme.write_text(text, encoding="utf-8")
    report = QuantiseReport(
        method=settings.method,
        scheme=settings.scheme,
        sha256=child.weights_sha256,
        n_quantised=len(_quantised(child)),
        bytes_before=parent.weights_bytes,
        bytes_after=child.weights_bytes,
        divergence_before=before.divergence,
        divergence_after=after.divergence,
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
        n_tokens=0 if windows is None else windows.numel(),
        compressor_version=version,
        seconds=time.monotonic() - began,
    )
    logger.info(
        "quantise: %s by %s, %.1f -> %.1f MiB, held-out divergence %.4f -> %.4f, perplexity %.2f -> %.2f, %.0f s",
        settings.scheme,
        settings.method,
        report.bytes_before / 2**20,
        report.bytes_after / 2**20,
        before.divergence,
        after.divergence,
        before.perplexity,
        after.perplexity,
        report.seconds,
    )
    return report


def claim(parent: ModelDirectory, child: ModelDirectory, proof: Proof) -> Claim:
    """Where something was quantised: what was not is the parent's bit for bit, what was is within its rounding, config
    and files say nothing else, and the held-out divergence rose by no more than allowed. Else the parent's weights.

    Raises:
        FileNotFoundError, ValueError: no report of the step.
        RuntimeError: logits that are not finite.
    """
    made = lineage.lineage_of(child)
    if [step.step for step in made] == [step.step for step in lineage.lineage_of(parent)]:
        same = parent.weights_sha256 == child.weights_sha256 and parent.settings == child.settings
        statement = "has the healed checkpoint's weights, unchanged"
        return Claim(name="quantise", statement=statement, holds=same, figures={}, limit=None)
    if proof.whole is None or proof.report is None:
        raise ValueError("the claim of a quantised checkpoint is checked with the whole model and the step's report")
    report = QuantiseReport.read(proof.report)
    settings = Quantised.model_validate(made[-1].settings)
    steps = before = after = math.nan
    if _same_but_for_quantised(parent, child) and report.sha256 == child.weights_sha256:
        steps = _largest_rounding(parent, child)
        pair, sources = [parent, child], proof.held_out_sources
        of_parent, of_child = compare(proof.whole, pair, proof.held_out, sources, proof.device, proof.weights_gib)
        before, after = of_parent.divergence, of_child.divergence
    return Claim(
        name="quantise",
        statement="has the healed checkpoint's weights, the quantised ones within their rounding, and diverges little "
        "more from the whole model on held-out tokens",
        holds=steps <= _ROUNDING[settings.method] and after - before <= settings.max_divergence_rise,
        figures={
            "max_divergence_rise": after - before,
            "divergence_before": before,
            "divergence_after": after,
            "rounding_steps": steps,
            "n_quantised": len(_quantised(child)),
        },
        limit=settings.max_divergence_rise,
    )


def _check_rise(before: Fidelity, after: Fidelity, settings: Quantised) -> None:
    rise = after.divergence - before.divergence
    if not rise <= settings.max_divergence_rise:
        raise ValueError(
            f"quantise: held-out divergence rises from {before.divergence:.4f} to {after.divergence:.4f}, by more than "
            f"quantise.max_divergence_rise = {settings.max_divergence_rise:g}: take another scheme or method, or name "
            "matrices in quantise.ignore"
        )


def _windows(tokens: Tokens, n_samples: int) -> Tensor:
    windows = tokens.calibration if tokens.healing is None else torch.cat([tokens.calibration, tokens.healing])
    return windows[:n_samples]


def _run(parent: ModelDirectory, result: Path, settings: Quantised, windows: Tensor | None) -> None:
    """Have llm-compressor quantise `parent` into the new directory `result`."""
    device = device_of(settings.device)
    variables = os.environ | {"HF_HUB_OFFLINE": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(compressor.PACKAGES), os.environ.get("PYTHONPATH")]))
    if device.type == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif device.index:
        # torch counts those that are visible.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device.index] if visible else str(device.index)
    result.mkdir()
    file = result / "windows.safetensors"
    if windows is not None:
        save_file({"windows": windows.contiguous()}, file)
    task = {
        "model": str(parent.path.absolute()),
        "result": str(result.absolute()),
        "scheme": scheme(settings),
        "ignore": _ignored(settings),
        "windows": None if windows is None else str(file.absolute()),
    }
    command = [interpreter(), "-m", "finercut.checkpoint.quantise_process", json.dumps(task)]
    process = start_group(command, variables)
    said, part = deque[str](["it said nothing"], maxlen=1), ""
    try:
        for line in process.stdout:
            if (found := _PART.match(line)) and found[1] != part:
                part = found[1]
                logger.info("quantise: %s parts of the model", part)
            elif line.strip():
                said.append(line.strip())
        status = process.wait()
    finally:
        end_group(process)
        process.stdin.close()
        process.stdout.close()
    if status:
        raise RuntimeError(f"llm-compressor failed on {parent}: {said[-1][:400]}")


def _ignored(settings: Quantised) -> list[str]:
    return list(dict.fromkeys([*settings.ignore, "re:.*lm_head$", "re:.*embed_out$"]))


def _matches(name: str, patterns: list[str]) -> bool:
    """As compressed-tensors matches names."""
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)


def _without_weights(model: ModelDirectory) -> PreTrainedModel:
    with torch.device("meta"):
        return getattr(modeling_finercut, model.config.architectures[0])(model.config)


def _quantised(child: ModelDirectory) -> dict[str, str]:
    """Each quantised weight with the name of its scale."""
    scales = [name for name in child.tensors if name.endswith(".weight_scale")]
    return {name.removesuffix("_scale"): name for name in scales}


def _same_but_for_quantised(parent: ModelDirectory, child: ModelDirectory) -> bool:
    """Whether config.json says the same but for quantisation and lineage, and tensors that are not quantised are equal
    bit for bit."""

    def said(model: ModelDirectory) -> dict[str, Any]:
        origin = {key: value for key, value in model.settings["finercut"].items() if key != "lineage"}
        return {k: v for k, v in model.settings.items() if k != QUANTISATION} | {"finercut": origin}

    quantised = _quantised(child)
    stored = {n for n in child.tensors if not re.fullmatch(r".*\.weight_(packed|scale|shape)", n)} - quantised.keys()
    return (
        said(parent) == said(child)
        and quantised.keys() <= parent.tensors.keys()
        and stored == parent.tensors.keys() - quantised.keys()
        and all(_same_bits(parent.tensor(name), child.tensor(name)) for name in stored)
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same_form = one.dtype == other.dtype and one.shape == other.shape
    return same_form and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _largest_rounding(parent: ModelDirectory, child: ModelDirectory) -> float:
    """Largest distance of a weight from what it is stored as, in steps of its scale there."""
    device = torch.device("cpu")
    healed, loaded = load(parent, torch.float32, device), load(child, torch.float32, device)
    floating = child.settings[QUANTISATION]["format"] == "float-quantized"
    largest = 0.0
    for name, scale_name in _quantised(child).items():
        before, after = healed.get_parameter(name).detach(), loaded.get_parameter(name).detach()
        scale = child.tensor(scale_name).float()
        scale = scale.repeat_interleave(before.shape[1] // scale.shape[1], 1)
        # float8_e4m3 has 3 bits after the leading one, and none smaller than 2**-9.
        step = torch.exp2((after / scale).abs().log2().floor().clamp(min=-6) - 3) if floating else 1.0
        largest = max(largest, ((after - before).abs() / (scale * step)).max().item())
    return largest
