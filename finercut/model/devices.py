"""Chooses device, dtype and, on several GPUs, where weights go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Of a GPU's free memory, the share for weights; the rest is for activations. accelerate takes the same.
WEIGHTS_SHARE = 0.9


def device_of(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is the GPU where there is one.

    Args:
        local_rank: which of this machine's GPUs `auto` and `cuda` stand for.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies in it; a CPU that does not is several times faster in float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        with torch.cuda.device(device):
            # Those that emulate it are slow at it, and vLLM refuses it there.
            able = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if able else torch.float32
    if device.type != "cpu":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    # Of x86, of x86 with matrix tiles, of ARM.
    return torch.bfloat16 if any(able.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def room_for(weights_bytes: int, free_bytes: Mapping[int, int]) -> dict[int, int]:
    """Which of some GPUs take a model's weights: the first that holds them alone, or else all of them together.

    Args:
        free_bytes: by the GPU's number.

    Returns:
        Bytes that weights may take, of each GPU chosen.

    Raises:
        ValueError: together they do not hold the weights.
    """
    room = {gpu: int(WEIGHTS_SHARE * free) for gpu, free in free_bytes.items()}
    for gpu, allowed in room.items():
        if weights_bytes <= allowed:
            return {gpu: allowed}
    if weights_bytes > sum(room.values()):
        raise no_room(weights_bytes, room)
    return room


def no_room(weights_bytes: int, room: Mapping[Any, int]) -> ValueError:
    return ValueError(
        f"the weights are {weights_bytes / 2**30:.3g} GiB, and there is room for "
        f"{' + '.join(f'{allowed / 2**30:.3g}' for allowed in room.values())} GiB on the device: "
        "set weights_gib in the stage's section of params.yaml, and they are streamed to it"
    )
