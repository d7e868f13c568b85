"""Runs a whole model with the outputs of some sublayers set to zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from finercut.model.families import Layout, layout_of
from finercut.sublayers import Sublayer


@contextmanager
def masked(
    model: PreTrainedModel, removed: Iterable[Sublayer], layout: Layout | None = None
) -> Iterator[PreTrainedModel]:
    """Run the whole `model` with the outputs of some sublayers replaced by zeros, as the authors do.

    No module is removed and the KV cache fills as in the whole model: the reference for every pruned model.

    Args:
        layout: of the model's family by default.
    """
    layout = layout or layout_of(model.config)
    blocks = model.get_submodule(layout.blocks)
    hooks = []
    for sublayer in removed:
        for path in layout.branch(sublayer.kind, sublayer.block).paths:
            last = path.after[-1] if path.after else path.core
            hooks.append(getattr(blocks[sublayer.block], last).register_forward_hook(_zero))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _zero(module: nn.Module, arguments: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)
