"""Asks vLLM, in seconds and before anything expensive, whether its engines would take a model, whole and pruned."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finercut.serving import vllm_engine
from finercut.serving.settings import EngineSettings
from finercut.system.machine import interpreter


@dataclass(frozen=True)
class Asked:
    """A model that vLLM is asked about."""

    directory: Path
    """Complete but for the weights."""
    weights: Mapping[str, Sequence[int]]
    """Shapes of all that its files store or will store, by name."""
    computing: Collection[str]
    """Names of weights that transformers computes with; some may not be stored."""


@dataclass(frozen=True)
class Answer:
    """What vLLM said of one model."""

    refusals: list[str | None]
    """For each engine asked about why it would not start, in one line; None where nothing speaks against it.
    Where the first is refused all are."""
    tokenizer: dict[str, Any] | None
    """`finercut.model.tokenizer_files.sample` of vLLM's tokenizer; None where the model has none."""


def ask(models: Sequence[Asked], engines: Sequence[EngineSettings]) -> list[Answer]:
    """What vLLM says of each model for each engine.

    vLLM checks its config for the model, makes the model without memory for weights, and for the first engine loads
    into it weights without values. It is imported in a process of its own, once.

    Raises:
        RuntimeError: vLLM is missing, or cannot be imported.
    """
    asked = {
        "models": [
            {
                "directory": str(model.directory.absolute()),
                "weights": dict(model.weights),
                "computing": sorted(model.computing),
            }
            for model in models
        ],
        "engines": [settings.model_dump(include=set(EngineSettings.model_fields)) for settings in engines],
    }
    return [Answer(**answer) for answer in _answer(asked)]


def ask_scheme(quantization_config: Mapping[str, Any], weight_bits: int, dtype: str) -> str | None:
    """Why vLLM's build or its device does not multiply matrices that are quantised so, in one line; None if it does,
    and gets right what they come to.

    Args:
        quantization_config: as in config.json of a checkpoint.
        weight_bits: of which integers make use.
        dtype: of the engine.

    Raises:
        RuntimeError: vLLM is missing, or cannot be imported.
    """
    return _answer({"quantization_config": dict(quantization_config), "weight_bits": weight_bits, "dtype": dtype})


def _answer(asked: Mapping[str, Any]) -> Any:
    vllm_engine.installed()
    done = subprocess.run(
        [interpreter(), "-m", "finercut.serving.vllm_foresight"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        errors="replace",
        env=vllm_engine.environment(),
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"vLLM failed: {vllm_engine.cause(done.stderr)}")
    return json.loads(done.stdout)
