"""Runs models larger than the device, by moving a sublayer's weights there when it runs.

Two slots on the device hold a sublayer's weights each. While one sublayer computes, the next one's weights
are copied into the other slot, so that with enough work per sublayer the transfers cost no time.

accelerate offloads as well (`cpu_offload`, `disk_offload`, `device_map` with "disk"), but its hooks fetch each tensor
when its module is called and compute waits for it; nothing is fetched ahead. Its loader of safetensors is not needed
either: transformers maps the files of a model that is loaded in the dtype it is stored in, so its weights in "CPU
memory" are pages of the files, which the system reads when they are used and may drop at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finercut.model.families import Layout, layout_of
from finercut.model.workers import single_threaded

N_SLOTS = 2
# Where a tensor starts in a slot, bytes: as CUDA's own allocator would place it, so that the same kernels are chosen.
ALIGNMENT = 512

Cast = Mapping[torch.dtype, torch.dtype]
"""What tensors of a dtype become on the device; others keep theirs."""


def stream(
    model: PreTrainedModel, device: torch.device, weights_bytes: int, dtype: torch.dtype | None = None
) -> Stream | None:
    """Make `model`, which is in CPU memory, run on `device` with at most `weights_bytes` of its weights there.

    Embeddings, norms, head and buffers move there permanently, as do as many attentions and MLPs as fit beside the
    slots, spread evenly over the depth. The others stay in CPU memory and are copied when they run.

    Args:
        model: whole or pruned.
        dtype: to compute in; that of `model` by default. Weights that stay in CPU memory keep theirs, and so remain
            pages of the files.

    Returns:
        The stream that copies them; None if all weights fit.

    Raises:
        ValueError: `weights_bytes` is less than the minimum.
    """
    kept = getattr(model.config, "finercut", None)  # of a pruned model
    layout = layout_of(model.config) if kept is None else Layout.from_dict(kept["layout"])
    cast = {model.dtype: dtype or model.dtype}
    blocks = layout.holders(model)
    members = (
        blocks[sublayer.block].get_submodule(name)
        for sublayer in layout.sublayers(len(blocks))
        for name in layout.branch(sublayer.kind, sublayer.block).members
    )
    # Norms are not worth a transfer of their own.
    modules = [member for member in members if any(p.dim() > 1 for p in member.parameters())]
    sizes = [sum(_nbytes(p, cast) for p in module.parameters()) for module in modules]
    total = sum(_nbytes(p, cast) for p in model.parameters())
    if total <= weights_bytes:
        _move(model, model.parameters(), device, cast)
        return None
    room = weights_bytes - (total - sum(sizes)) - N_SLOTS * max(_slot_bytes(m.parameters(), cast) for m in modules)
    if room < 0:
        raise ValueError(
            f"{weights_bytes / 2**30:.3g} GiB do not hold the embeddings, the head and {N_SLOTS} sublayers of this "
            f"model: {(weights_bytes - room) / 2**30:.3g} GiB are needed"
        )
    streamed = [module for module, stays in zip(modules, _spread(sizes, room), strict=True) if not stays]
    brought = {id(parameter) for module in streamed for parameter in module.parameters()}
    _move(model, [p for p in model.parameters() if id(p) not in brought], device, cast)
    return Stream(streamed, device, cast)


def _move(model: nn.Module, parameters: Iterable[Tensor], device: torch.device, cast: Cast) -> None:
    """Move parameters and all buffers. Buffers that no file holds, such as frequencies, keep their dtype."""
    stored = model.state_dict().keys()
    for tensor in (*parameters, *(buffer for name, buffer in model.named_buffers() if name in stored)):
        tensor.data = tensor.data.to(device, cast.get(tensor.dtype, tensor.dtype))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _spread(sizes: Sequence[int], room: int) -> list[bool]:
    """Which of the `sizes` to choose, evenly among the others, so that their sum is at most `room`."""
    chosen, passed, taken = [], 0, 0
    for size in sizes:
        passed += size
        chosen.append((taken + size) * sum(sizes) <= room * passed)
        taken += size * chosen[-1]
    return chosen


def _nbytes(tensor: Tensor, cast: Cast) -> int:
    """On the device."""
    return tensor.numel() * cast.get(tensor.dtype, tensor.dtype).itemsize


def _slot_bytes(tensors: Iterable[Tensor], cast: Cast) -> int:
    return sum(-(-_nbytes(tensor, cast) // ALIGNMENT) * ALIGNMENT for tensor in tensors)


@dataclass(eq=False)
class _Slot:
    """Device memory for the weights of one module."""

    memory: Tensor
    staging: Tensor | None
    """Pinned CPU memory of the same size, the only kind that a GPU copies from while it computes. None on a CPU."""
    module: int | None = None
    """Whose weights are here or being copied."""
    n_running: int = 0
    """Number of that module's forwards running now."""
    filled: Future | None = None
    arrived: Any = None
    """CUDA event after the transfer."""
    used: Any = None
    """CUDA event after the last forward."""
    bound: bool = field(default=False)
    """Whether the module's parameters are the ones here."""


class Stream:
    """Copies modules' weights to the device when they are called, and meanwhile those of the next module.

    The next module is predicted to be the one that followed the last time. Any order of calls gives right results, from
    several threads too; a wrong prediction is only slower.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, cast: Cast) -> None:
        self.device = device
        self._cast = cast
        self.bytes_brought = 0
        """To the device so far."""
        self.bytes_late = 0
        """Of these, bytes whose copy had not begun when they were needed."""
        self._parameters = [list(module.parameters()) for module in modules]
        self._home = [[p.data for p in parameters] for parameters in self._parameters]
        self._next = {i: (i + 1) % len(modules) for i in range(len(modules))}
        self._last: int | None = None
        size = max(_slot_bytes(home, cast) for home in self._home)
        on_gpu = device.type == "cuda"
        with torch.inference_mode(False):  # Parameters do not take their data from tensors made in inference mode
            self._slots = [
                _Slot(
                    torch.empty(size, dtype=torch.uint8, device=device),
                    torch.empty(size, dtype=torch.uint8, pin_memory=True) if on_gpu else None,
                )
                for _ in range(N_SLOTS)
            ]
        self._transfers = torch.cuda.Stream(device) if on_gpu else None
        # One thread a core already works on a CPU; see `Workers`.
        self._thread = ThreadPoolExecutor(1) if on_gpu else single_threaded(1)
        self._changed = threading.Condition()
        for i, module in enumerate(modules):
            module.register_forward_pre_hook(lambda *_, i=i: self._begin(i))
            module.register_forward_hook(lambda *_, i=i: self._end(i), always_call=True)

    @property
    def device_bytes(self) -> int:
        """Of the slots."""
        return sum(slot.memory.nbytes for slot in self._slots)

    def _begin(self, module: int) -> None:
        """Before a forward of the module: get its weights to the device, and start copying the next one's."""
        with self._changed:
            while (slot := self._slot_of(module)) is None:
                idle = self._idle()
                if idle is None:
                    self._changed.wait()
                else:
                    self.bytes_late += self._fill(idle, module)
            slot.n_running += 1
            if self._last not in (None, module):
                self._next[self._last] = module
            self._last = module
            ahead, idle = self._next[module], self._idle()
            if idle is not None and self._slot_of(ahead) is None:
                self._fill(idle, ahead)
        slot.filled.result()
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        with self._changed:
            if not slot.bound:
                for parameter, here in zip(self._parameters[module], self._views(slot.memory, module), strict=True):
                    parameter.data = here
                slot.bound = True

    def _end(self, module: int) -> None:
        with self._changed:
            slot = self._slot_of(module)
            slot.n_running -= 1
            if slot.staging is not None:
                slot.used = torch.cuda.current_stream(self.device).record_event()
            self._changed.notify_all()

    def _slot_of(self, module: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.module == module), None)

    def _idle(self) -> _Slot | None:
        return next((slot for slot in self._slots if slot.n_running == 0), None)

    def _fill(self, slot: _Slot, module: int) -> int:
        """Start copying a module's weights into an idle slot; returns their bytes."""
        if slot.bound:
            for parameter, home in zip(self._parameters[slot.module], self._home[slot.module], strict=True):
                parameter.data = home
        slot.module, slot.bound = module, False
        slot.filled = self._thread.submit(self._copy, slot, module)
        n_bytes = sum(_nbytes(home, self._cast) for home in self._home[module])
        self.bytes_brought += n_bytes
        return n_bytes

    def _copy(self, slot: _Slot, module: int) -> None:
        if slot.staging is None:
            for here, home in zip(self._views(slot.memory, module), self._home[module], strict=True):
                here.copy_(home)
            return
        if slot.arrived is not None:
            slot.arrived.synchronize()  # until then the last transfer still reads the staging memory
        for staged, home in zip(self._views(slot.staging, module), self._home[module], strict=True):
            staged.copy_(home)
        with torch.cuda.stream(self._transfers):
            if slot.used is not None:
                self._transfers.wait_event(slot.used)
            slot.memory.copy_(slot.staging, non_blocking=True)
            slot.arrived = self._transfers.record_event()

    def _views(self, memory: Tensor, module: int) -> list[Tensor]:
        """Where each of the module's parameters lies in a slot's memory."""
        views, start = [], 0
        for home in self._home[module]:
            n_bytes, dtype = _nbytes(home, self._cast), self._cast.get(home.dtype, home.dtype)
            views.append(memory[start : start + n_bytes].view(dtype).view(home.shape))
            start += -(-n_bytes // ALIGNMENT) * ALIGNMENT
        return views
