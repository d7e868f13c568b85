"""The families' random models as vLLM can run them, and less some sublayers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from family_models import CASES, N_BLOCKS, random_model

from finercut.checkpoint.writing import write_pruned
from finercut.sublayers import Sublayer, parse

TOLERANCE = 1e-4
"""Of log-probabilities, nats."""


def sublayers(*names: str) -> list[Sublayer]:
    return [s for name in names for s in parse(name).sublayers]


# The first sublayer of the model, a whole block, the last one of the model.
REMOVED = sublayers("0.attention", "1.block", "3.mlp")

# Heads of 32, the least that vLLM's attention takes on a CPU.
HEADS = {"hidden_size": 128, "head_dim": 32}
UNGROUPED = {"num_key_value_heads": 4}
NO_WINDOWS = {"use_sliding_window": False, "layer_types": ["full_attention"] * N_BLOCKS}
# What vLLM does not do, with whole models either.
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2": NO_WINDOWS,
    # It has no bias for the output of Qwen 3's attention.
    "qwen3": {**NO_WINDOWS, "attention_bias": False},
    "qwen3_moe": {"attention_bias": False},
    "gpt2": {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False},
}


def model_for_vllm(case: str) -> Any:
    model_type, changes = CASES[case]
    ungrouped = UNGROUPED if model_type in ("gpt_neox", "gpt2", "opt") else {}
    return random_model(model_type, **changes | HEADS | ungrouped | CHANGES.get(case, {}))


def write(model: Any, removed: list[Sublayer], directory: Path) -> Path:
    if not removed:
        model.save_pretrained(directory)
        return directory
    whole = directory.with_name("whole model")
    if not whole.exists():
        model.save_pretrained(whole)
    directory.mkdir()
    write_pruned(whole, removed, directory, {}, "")
    return directory
