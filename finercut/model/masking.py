"""Runs a whole model with the outputs of some sublayers set to zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from finercut.model.families import Layout, layout_of
from finercut.model.modeling_finercut import argument
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
    blocks = layout.holders(model)
    hooks = []
    for sublayer in removed:
        for path in layout.branch(sublayer.kind, sublayer.block).paths:
            last = blocks[sublayer.block].get_submodule(path.after[-1] if path.after else path.core)
            hooks.append(last.register_forward_hook(partial(_add_nothing, path.stream), with_kwargs=True))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _add_nothing(stream: int | str | None, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    left = torch.zeros_like(first) if stream is None else argument(args, kwargs, stream)
    return (left, *output[1:]) if isinstance(output, tuple) else left
