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

# Tokens of one forward: their logits take 1 GiB at a vocabulary of 262,144.
TOKENS_AT_ONCE = 1024

Logits = Callable[[Tensor], Tensor]
"""Token ids, (samples, tokens) -> logits, (samples, tokens, vocab)."""


@dataclass(frozen=True)
class Fidelity:
    divergence: float
    """js from the whole model, nats per token; a mean over sources, as in the search."""
    perplexity: float
    """Of the model itself on the text, over all tokens; not of the whole model's predictions."""


class HeldOut:
    """Held-out windows, and what one whole model predicts there: it computes that once."""

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
    def fidelity(self, whole: Logits, other: Logits, device: torch.device) -> Fidelity:
        """
        Args:
            whole: always the same model's, in the same dtype.
            device: of both models.

        Raises:
            RuntimeError: logits that are not finite.
        """
        n_samples, n_tokens = self.windows.shape
        n_at_once = max(1, TOKENS_AT_ONCE // n_tokens)
        batches = self.windows.to(device).split(n_at_once)
        if not self._expected:
            self._expected = [whole(batch).cpu() for batch in batches]
        of_windows = torch.tensor(source_weights(self.sources or ("",) * n_samples), device=device)
        divergence = surprise = 0.0
        for batch, expected, weights in zip(batches, self._expected, of_windows.split(n_at_once), strict=True):
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
) -> list[Fidelity]:
    """Of each of some checkpoints, in float32; the whole model and one other are in memory at a time."""
    held_out, reference = HeldOut(windows, sources), logits_of(load(whole, torch.float32, device))
    others = (logits_of(load(directory, torch.float32, device)) for directory in pruned)
    return [held_out.fidelity(reference, other, device) for other in others]


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
