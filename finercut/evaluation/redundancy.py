"""What of a whole model does little: how much each sublayer and head adds to the stream, and what is lost without it.

Beside that, the outliers of activations, which decide how well a model can be quantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finercut.evaluation.records import SublayerFigures
from finercut.model.families import Branch, layout_of
from finercut.model.masking import masked

_TINY = 1e-20


@torch.inference_mode()
def redundancy(model: PreTrainedModel, windows: Tensor, n_tokens: int) -> list[SublayerFigures]:
    """Of every sublayer of the whole model, by depth.

    Args:
        windows: token ids, (samples, tokens): one pass over all
        n_tokens: the first of a window on which each sublayer is removed alone: a pass a sublayer
    """
    layout = layout_of(model.config)
    blocks = layout.holders(model)
    sublayers = layout.sublayers(len(blocks))
    windows = windows.to(model.device)
    n_heads = getattr(model.config, "num_attention_heads", None)
    with ExitStack() as stack:
        watches = [
            _Watch(blocks[s.block], layout.branch(s.kind, s.block), n_heads if s.kind == "attention" else None, stack)
            for s in sublayers
        ]
        for window in windows:
            model(window[None], use_cache=False)
    few, alone = windows[0, :n_tokens], {}
    whole = _log_p(model, few)
    for sublayer in sublayers:
        with masked(model, [sublayer], layout):
            lost = torch.nn.functional.kl_div(_log_p(model, few), whole, reduction="batchmean", log_target=True)
        alone[sublayer] = max(0.0, lost.item()) if lost.isfinite() else None  # rounding can make it negative
    return [
        SublayerFigures(
            sublayer=str(sublayer),
            alone=alone[sublayer],
            contribution=watch.contribution.mean,
            heads=tuple(watch.heads.means),
            # Some matrices are read and not called; an expert may see no token.
            peak=max((peak.mean for peak in watch.peaks.values() if peak.n), default=None),
        )
        for sublayer, watch in zip(sublayers, watches, strict=True)
    ]


def _log_p(model: PreTrainedModel, window: Tensor) -> Tensor:
    """(tokens, vocab)"""
    return model(window[None], use_cache=False).logits[0].float().log_softmax(-1)


class _Mean:
    """Of values a token: (tokens,) or (tokens, values)."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.n = 0

    def add(self, values: Tensor) -> None:
        total = values.double().sum(0).cpu()
        self.sum = total if self.sum is None else self.sum + total
        self.n += len(values)

    @property
    def mean(self) -> float:
        return self.sum.item() / self.n

    @property
    def means(self) -> list[float]:
        return [] if self.sum is None else (self.sum / self.n).tolist()


class _Watch:
    """One sublayer, while windows run through the model."""

    def __init__(self, block: nn.Module, branch: Branch, n_heads: int | None, stack: ExitStack) -> None:
        self.contribution, self.heads = _Mean(), _Mean()
        self.peaks: dict[nn.Module, _Mean] = {}
        self.n_heads = n_heads
        self._stream: Tensor | None = None
        self._added: Tensor | None = None
        self._shares: Tensor | None = None

        def watch(hook: Any) -> None:
            stack.callback(hook.remove)

        watch(block.get_submodule(branch.members[0]).register_forward_pre_hook(self._begin, with_kwargs=True))
        for path in branch.paths:
            last = block.get_submodule(path.after[-1] if path.after else path.core)
            watch(last.register_forward_hook(partial(self._add, path.stream is not None)))
        for member in dict.fromkeys(branch.members):
            for module in _matrices(block.get_submodule(member)):
                self.peaks[module] = _Mean()
                watch(module.register_forward_pre_hook(self._see))
        if n_heads:
            for module in _matrices(block.get_submodule(branch.core)):
                watch(module.register_forward_hook(self._split))
        watch(block.register_forward_hook(self._end))

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        stream = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        self._stream, self._added, self._shares = _rows(stream), None, None

    def _add(self, adds_itself: bool, module: nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if output.shape[-1] == self._stream.shape[-1] and output.is_floating_point():
            added = _rows(output) - self._stream if adds_itself else _rows(output)
            self._added = added if self._added is None else self._added + added

    def _see(self, module: nn.Module, args: tuple) -> None:
        if args and args[0].numel():
            seen = _rows(args[0]).abs()
            self.peaks[module].add(seen.amax(-1) / seen.square().mean(-1).sqrt().clamp_min(_TINY))

    def _split(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Of the last matrix that writes to the stream, the norm of what each head's inputs write."""
        weight = module.weight.T if isinstance(module, nn.Linear) else module.weight  # (inputs, outputs)
        if weight.shape[0] % self.n_heads or weight.shape[1] != self._stream.shape[-1]:
            return
        parts = _rows(args[0]).chunk(self.n_heads, -1)
        written = [(part @ w.float()).norm(dim=-1) for part, w in zip(parts, weight.chunk(self.n_heads), strict=True)]
        self._shares = torch.stack(written, -1) / _rows(output).norm(dim=-1, keepdim=True).clamp_min(_TINY)

    def _end(self, *_: Any) -> None:
        if self._added is None:
            return
        ratio = self._added.norm(dim=-1) / self._stream.norm(dim=-1).clamp_min(_TINY)
        self.contribution.add(ratio)
        if self._shares is not None:
            # Relative to what the matrix writes: a norm may follow.
            self.heads.add(self._shares * ratio[:, None])


def _matrices(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if isinstance(m, nn.Linear | Conv1D))


def _rows(states: Tensor) -> Tensor:
    """(tokens, values), float32"""
    return states.flatten(0, -2).float()
