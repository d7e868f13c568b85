"""Loads whole and pruned models for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from finercut.model.configs import QUANTISATION
from finercut.model.devices import device_of, no_room, room_for
from finercut.model.directory import ModelDirectory, one_line_errors, quiet
from finercut.model.families import LAYOUT_KEY, auto_class, check_supported, is_declared
from finercut.model.probe import find_layout
from finercut.model.quantised import make_plain
from finercut.model.streaming import stream


def load_whole(
    model: ModelDirectory | Path | str,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    *,
    room: Mapping[int | str, int] | None = None,
) -> PreTrainedModel:
    """The whole model, in evaluation mode, with what lies around its language model.

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
        loaded, info = auto_class(directory.config).from_pretrained(
            directory.path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=directory.trusted,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_attention(directory.config),
            **_spread(room),
        )
    wrong = info["missing_keys"] or info["mismatched_keys"]
    if wrong:
        raise ValueError(f"the weights in {directory} do not fit its config: {sorted(map(str, wrong))[:3]}")
    _place(loaded, device, room)
    if not is_declared(loaded.config):
        setattr(loaded.config, LAYOUT_KEY, find_layout(loaded).to_dict())
    return loaded


def load_pruned(
    model: ModelDirectory | Path | str,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    *,
    room: Mapping[int | str, int] | None = None,
) -> PreTrainedModel:
    """A pruned model, in evaluation mode. Quantised weights are dequantised, inputs quantised as vLLM does.

    Args:
        dtype, room: as of `load_whole`.

    Raises:
        FileNotFoundError: no model there.
        ValueError: not a pruned model, or its weights do not fit its config.
    """
    directory = ModelDirectory.of(model).written_by("prune")
    if not directory.is_pruned:
        raise ValueError(f"{directory} holds a {directory.settings.get('model_type')} model, not a pruned one")
    config, trusted = copy.deepcopy(directory.config), directory.trusted
    if quantised := QUANTISATION in directory.settings:
        config.quantization_config["dequantize"] = True
    _ = directory.tensors
    # compressed-tensors draws bars that nothing turns off.
    silent = redirect_stderr(StringIO()) if quantised else nullcontext()
    with one_line_errors(f"{directory} is no pruned checkpoint, or a damaged one"), silent:
        loaded = AutoModelForCausalLM.from_pretrained(
            directory.path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trusted,
            ignore_mismatched_sizes=True,
            **({"config": config} if quantised else {}),
            **_attention(config),
            **_spread(room),
        )
        if quantised:
            make_plain(loaded)
    _place(loaded, device, room)
    return loaded


def _spread(room: Mapping[int | str, int] | None) -> dict[str, Any]:
    return {} if room is None else {"device_map": "auto", "max_memory": dict(room)}


def _place(model: PreTrainedModel, device: torch.device | str, room: Mapping[int | str, int] | None) -> None:
    if room is None:
        model.to(device)
    elif set(getattr(model, "hf_device_map", {}).values()) - room.keys():
        # accelerate does not split blocks: those that fit nowhere would be read from the disk at every forward.
        raise no_room(sum(p.numel() * p.element_size() for p in model.parameters()), room)
    model.eval()


def load(
    model: ModelDirectory | Path | str,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    *,
    room: Mapping[int | str, int] | None = None,
    weights_gib: float | None = None,
) -> PreTrainedModel:
    """A whole or a pruned model, as `load_whole` or `load_pruned` loads it.

    Args:
        weights_gib: of the device's memory, for weights. Where they need more, sublayers are brought when they run, and
            the others remain pages of the files, which need no memory of the process.

    Raises:
        FileNotFoundError, ValueError: as `load_whole` and `load_pruned`; or `weights_gib` is too little.
    """
    directory = ModelDirectory.of(model)
    loads = load_pruned if directory.is_pruned else load_whole
    if weights_gib is None:
        return loads(directory, dtype, device, room=room)
    loaded = loads(directory, getattr(torch, directory.dtype, "auto"))
    stream(loaded, torch.device(device), int(weights_gib * 2**30), None if isinstance(dtype, str) else dtype)
    return loaded


def load_on(
    model: ModelDirectory | Path | str, dtype: torch.dtype, device: str, weights_gib: float | None = None
) -> PreTrainedModel:
    """A model where params.yaml says: with `auto` on several GPUs on the first that holds it, or on all of them.

    Args:
        device: auto, cpu, cuda, cuda:1, ...
        weights_gib: as in `load`.

    Raises:
        FileNotFoundError, ValueError: as `load`; or there is no such device, or the GPUs have no room.
    """
    directory, chosen, room = ModelDirectory.of(model), device_of(device), None
    if weights_gib is None and chosen.type == "cuda":
        gpus = range(torch.cuda.device_count()) if device == "auto" else [chosen.index]
        room = room_for(directory.n_elements * dtype.itemsize, {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus})
        if len(room) == 1:
            chosen, room = torch.device("cuda", *room), None
    return load(directory, dtype, chosen, room=room, weights_gib=weights_gib)


def _attention(config: PreTrainedConfig) -> dict[str, str]:
    # Transformers' default attention leaves soft caps out; vLLM's does not.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}
