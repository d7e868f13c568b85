"""How far a pruned model is from the whole one, on text that it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finercut.model.directory import ModelDirectory
from finercut.model.loading import load
from finercut.selection.divergence import js
from finercut.tokens import source_weights

# Logits of one forward, in numbers: 256 MiB in float32.
LOGITS_AT_ONCE = 1 << 26

Logits = Callable[[Tensor], Tensor]
"""Token ids, (samples, tokens) -> logits, (samples, tokens, vocab)."""


@dataclass(frozen=True)
class Fidelity:
    divergence: float
    """js from the whole model, nats per token; a mean over sources, as in the search."""
    perplexity: float
    """Of the model itself on the text, over all tokens; not of the whole model's predictions."""


class HeldOut:
    """Held-out windows, and what the whole model predicts there."""

    def __init__(self, windows: Tensor, sources: Sequence[str] = ()) -> None:
        """
        Args:
            windows: token ids, (samples, tokens), of at least two tokens.
            sources: of each window; empty where all are from one.
        """
        self.windows, self.sources = windows, tuple(sources)
        self._expected: list[Tensor] = []
        """The whole model's logits of each batch, (samples, tokens, vocab), in its dtype and in main memory."""

    @torch.no_grad()
    def expect(self, whole: Logits, device: torch.device) -> None:
        """Have the whole model predict, unless it has: it need not be in memory afterwards."""
        if self._expected:
            return
        windows = self.windows.to(device)
        n_at_once = max(1, LOGITS_AT_ONCE // whole(windows[:1]).numel())
        self._expected = [whole(batch).cpu() for batch in windows.split(n_at_once)]

    @torch.no_grad()
    def fidelity(self, other: Logits, device: torch.device) -> Fidelity:
        """
        Raises:
            RuntimeError: logits that are not finite.
        """
        n_samples, n_tokens = self.windows.shape
        sizes = [len(expected) for expected in self._expected]
        batches = self.windows.to(device).split(sizes)
        of_windows = torch.tensor(source_weights(self.sources or ("",) * n_samples), device=device).split(sizes)
        divergence = surprise = 0.0
        for batch, expected, weights in zip(batches, self._expected, of_windows, strict=True):
            found = other(batch).float()
            divergence += (weights[:, None] * js(expected.to(device), found)).double().sum().item()
            predicted, target = found[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
            surprise += torch.nn.functional.cross_entropy(predicted, target, reduction="sum").item()
        if not math.isfinite(divergence + surprise):
            raise RuntimeError("the logits on held-out tokens are not finite")
        return Fidelity(divergence / self.windows.numel(), _exp(surprise / (n_samples * (n_tokens - 1))))


def logits_of(model: PreTrainedModel) -> Logits:
    return lambda tokens: model(input_ids=tokens, use_cache=False).logits


def compare(
    whole: ModelDirectory,
    pruned: list[ModelDirectory],
    windows: Tensor,
    sources: Sequence[str],
    device: torch.device,
    weights_gib: float | None = None,
) -> list[Fidelity]:
    """Of each of some checkpoints, in float32. One model is in memory at a time.

    Args:
        weights_gib: of the device's memory, for a model's weights; None takes what they need.
    """

    def loaded(model: ModelDirectory) -> Logits:
        return logits_of(load(model, torch.float32, device, weights_gib=weights_gib))

    held_out = HeldOut(windows, sources)
    held_out.expect(loaded(whole), device)
    return [held_out.fidelity(loaded(other), device) for other in pruned]


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
