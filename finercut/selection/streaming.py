"""Models larger than the device: the weights of a sublayer come to it when the sublayer runs.

Two slots on the device hold a sublayer's weights each. While one sublayer computes, the weights of the next are on
their way into the other slot, so that with enough work a sublayer the transfers cost no time.

accelerate offloads as well (`cpu_offload`, `disk_offload`, `device_map` with "disk"), but its hooks fetch each tensor
when its module is called and compute waits for it; nothing is fetched ahead. Its loader of safetensors is not needed
either: transformers maps the files of a model that is loaded in the dtype it is stored in, so its weights in "CPU
memory" are pages of the files, which the system reads when they are used and may drop at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finercut.model.families import layout_of
from finercut.sublayers import KINDS

N_SLOTS = 2
# Where a tensor starts in a slot, bytes: as CUDA's own allocator would place it, so that the same kernels are chosen.
ALIGNMENT = 512


def stream(model: PreTrainedModel, device: torch.device, weights_bytes: int) -> Stream | None:
    """Let `model`, which is in CPU memory, run on `device` with at most `weights_bytes` of its weights there.

    Embeddings, norms, head and buffers are moved there for good; so are as many attentions and MLPs as there is room
    for beside the slots, spread evenly over the depth. The others stay where they are and are brought when they run.

    Returns:
        What brings them; None if all weights fit.

    Raises:
        ValueError: `weights_bytes` does not hold the least that is needed.
    """
    layout = layout_of(model.config)
    names = [name for kind in KINDS for name in layout.branch(kind).members]
    members = (getattr(block, name) for block in model.get_submodule(layout.blocks) for name in names)
    # Norms are not worth a transfer of their own.
    modules = [member for member in members if any(p.dim() > 1 for p in member.parameters())]
    sizes = [_nbytes(module.parameters()) for module in modules]
    total = _nbytes(model.parameters())
    if total <= weights_bytes:
        model.to(device)
        return None
    room = weights_bytes - (total - sum(sizes)) - N_SLOTS * max(map(_slot_bytes, modules))
    if room < 0:
        raise ValueError(
            f"{weights_bytes / 2**30:.3g} GiB do not hold the embeddings, the head and {N_SLOTS} sublayers of this "
            f"model: {(weights_bytes - room) / 2**30:.3g} GiB are needed"
        )
    streamed = [module for module, stays in zip(modules, _spread(sizes, room), strict=True) if not stays]
    brought = {id(parameter) for module in streamed for parameter in module.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in brought:
            tensor.data = tensor.data.to(device)
    return Stream(streamed, device)


def _spread(sizes: Sequence[int], room: int) -> list[bool]:
    """Which of the `sizes` to choose so that they come to no more than `room` and lie evenly among the others."""
    chosen, passed, taken = [], 0, 0
    for size in sizes:
        passed += size
        chosen.append((taken + size) * sum(sizes) <= room * passed)
        taken += size * chosen[-1]
    return chosen


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _slot_bytes(module: nn.Module) -> int:
    return sum(-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in module.parameters())


def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(eq=False)
class _Slot:
    """Room on the device for the weights of one module."""

    memory: Tensor
    staging: Tensor | None
    """Pinned CPU memory of the same size: only from there a GPU fetches while it computes. None on a CPU."""
    module: int | None = None
    """Whose weights are here or on their way."""
    n_running: int = 0
    """Forwards of that module under way."""
    filled: Future | None = None
    arrived: Any = None
    """CUDA event after the transfer."""
    used: Any = None
    """CUDA event after the last forward."""
    bound: bool = field(default=False)
    """Whether the module's parameters are the ones here."""


class Stream:
    """Brings the weights of modules to the device when they are called, and the next one's meanwhile.

    They are called in about the same order again and again: the next one is the one that came next the last time.
    Any order is right, and so are calls from several threads; another order than the last time's is only slower.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self.bytes_brought = 0
        """To the device so far."""
        self.bytes_late = 0
        """Of these, what was not on its way when it was needed."""
        self._parameters = [list(module.parameters()) for module in modules]
        self._home = [[p.data for p in parameters] for parameters in self._parameters]
        self._next = {i: (i + 1) % len(modules) for i in range(len(modules))}
        self._last: int | None = None
        size = max(map(_slot_bytes, modules))
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
        self._thread = ThreadPoolExecutor(1, initializer=None if on_gpu else _one_thread)
        self._changed = threading.Condition()
        for i, module in enumerate(modules):
            module.register_forward_pre_hook(lambda *_, i=i: self._begin(i))
            module.register_forward_hook(lambda *_, i=i: self._end(i), always_call=True)

    @property
    def device_bytes(self) -> int:
        """Of the slots."""
        return _nbytes(slot.memory for slot in self._slots)

    def _begin(self, module: int) -> None:
        """Before a forward of the module: its weights are there when this returns, the next one's on their way."""
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
        """Start to bring a module's weights into an idle slot; returns their bytes."""
        if slot.bound:
            for parameter, home in zip(self._parameters[slot.module], self._home[slot.module], strict=True):
                parameter.data = home
        slot.module, slot.bound = module, False
        slot.filled = self._thread.submit(self._copy, slot, module)
        n_bytes = _nbytes(self._home[module])
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
            views.append(memory[start : start + home.nbytes].view(home.dtype).view(home.shape))
            start += -(-home.nbytes // ALIGNMENT) * ALIGNMENT
        return views
