"""Loads whole and pruned models for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from finercut.model.devices import no_room
from finercut.model.directory import ModelDirectory, one_line_errors, quiet
from finercut.model.families import LAYOUT_KEY, check_supported, is_declared
from finercut.model.probe import find_layout


def load_whole(
    model: ModelDirectory | Path | str,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    *,
    room: Mapping[int | str, int] | None = None,
) -> PreTrainedModel:
    """The whole model, in evaluation mode.

    Args:
        dtype: `auto` keeps what the weights are stored as.
        room: bytes for weights on each of several devices: accelerate spreads the model over them instead of `device`.

    Raises:
        FileNotFoundError: no model there.
        ValueError: it cannot be pruned, its weights do not fit its config, or the devices have no room for them.
    """
    directory = ModelDirectory.of(model).written_by("fetch")
    check_supported(directory.config)
    _ = directory.tensors  # names the file that is damaged; transformers does not
    with quiet():
        loaded, info = AutoModelForCausalLM.from_pretrained(
            directory.path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=directory.trusted,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_attention(directory.config),
            **({} if room is None else {"device_map": "auto", "max_memory": dict(room)}),
        )
    wrong = info["missing_keys"] or info["mismatched_keys"]
    if wrong:
        raise ValueError(f"the weights in {directory} do not fit its config: {sorted(map(str, wrong))[:3]}")
    if room is None:
        loaded.to(device)
    elif set(getattr(loaded, "hf_device_map", {}).values()) - room.keys():
        # accelerate does not split blocks: those that fit nowhere would be read from the disk at every forward.
        raise no_room(sum(p.numel() * p.element_size() for p in loaded.parameters()), room)
    loaded.eval()
    if not is_declared(loaded.config):
        setattr(loaded.config, LAYOUT_KEY, find_layout(loaded).to_dict())
    return loaded


def load_pruned(
    model: ModelDirectory | Path | str, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A pruned model, in evaluation mode.

    Raises:
        FileNotFoundError: no model there.
        ValueError: not a pruned model, or its weights do not fit its config.
    """
    directory = ModelDirectory.of(model).written_by("prune")
    if not directory.is_pruned:
        raise ValueError(f"{directory} holds a {directory.settings.get('model_type')} model, not a pruned one")
    config, trusted = directory.config, directory.trusted
    _ = directory.tensors
    with one_line_errors(f"{directory} is no pruned checkpoint, or a damaged one"):
        loaded = AutoModelForCausalLM.from_pretrained(
            directory.path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trusted,
            ignore_mismatched_sizes=True,
            **_attention(config),
        )
    return loaded.eval().to(device)


def load(
    model: ModelDirectory | Path | str, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A whole or a pruned model, as `load_whole` or `load_pruned` loads it."""
    directory = ModelDirectory.of(model)
    return (load_pruned if directory.is_pruned else load_whole)(directory, dtype, device)


def _attention(config: PreTrainedConfig) -> dict[str, str]:
    # Transformers' default attention leaves soft caps out; vLLM's does not.
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
