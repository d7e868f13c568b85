"""Controls of a search: what the divergence of next-token distributions does not see."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finercut.model.caches import forward
from finercut.model.masking import masked
from finercut.model.workers import Workers
from finercut.selection.distributed import Ranks
from finercut.sublayers import Sublayer
from finercut.tokens import repetition

# Of a held-out window, at most: half of it where it is shorter.
PREFIX_TOKENS = 32


class Continuations:
    """Short greedy continuations of held-out prefixes, by the whole model and with sublayers removed."""

    def __init__(self, held_out: Tensor, n_texts: int, n_tokens: int) -> None:
        """
        Args:
            held_out: token ids, (windows, tokens). The first `n_texts` windows are continued, or all.
            n_tokens: written for each, at most.
        """
        self.prefixes = held_out[:n_texts, : prefix_tokens(held_out.shape[1])]
        self.n_tokens = n_tokens
        self._whole: tuple[float, float | None] | None = None

    def of(
        self, model: PreTrainedModel, removed: Iterable[Sublayer], workers: Workers, ranks: Ranks
    ) -> dict[str, float | None]:
        """The fields of `Controls` that continuations give; the same in however many processes."""
        if self._whole is None:
            self._whole = self._measured(model, (), workers, ranks)
        repetition, missing_ends = self._measured(model, removed, workers, ranks)
        return {
            "repetition": repetition,
            "missing_ends": missing_ends,
            "whole_repetition": self._whole[0],
            "whole_missing_ends": self._whole[1],
        }

    def _measured(
        self, model: PreTrainedModel, removed: Iterable[Sublayer], workers: Workers, ranks: Ranks
    ) -> tuple[float, float | None]:
        ends = end_tokens(model)
        # On a CPU a text a thread, as in the sweep: the number of threads must not change a bit.
        pieces = self.prefixes.split(1 if model.device.type == "cpu" else len(self.prefixes))
        with masked(model, removed):
            mine = pieces[ranks.rank :: ranks.size]
            written = workers.map(lambda piece: greedy(model, piece, self.n_tokens, ends), mine)
        texts = [text for share in ranks.gather([text for piece in written for text in piece]) for text in share]
        missing = sum(ends.isdisjoint(text) for text in texts) / len(texts) if ends else None
        return sum(sorted(map(repetition, texts))) / len(texts), missing


def prefix_tokens(n_tokens: int) -> int:
    """Of a held-out window of `n_tokens`, those that are continued."""
    return max(1, min(PREFIX_TOKENS, n_tokens // 2))


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    # A model of its own code may have no generation config.
    ids = getattr(getattr(model, "generation_config", None) or model.config, "eos_token_id", None)
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


@torch.inference_mode()
def greedy(model: PreTrainedModel, prefixes: Tensor, n_tokens: int, ends: frozenset[int]) -> list[list[int]]:
    """The most likely tokens after each prefix, (texts, tokens), up to an end token, which is the last."""
    seen, cache, written = prefixes.to(model.device), None, []
    given = seen
    for _ in range(n_tokens):
        output, cache = forward(model, given, cache)
        likeliest = output.logits[:, -1:].argmax(-1)
        seen = torch.cat([seen, likeliest], -1)
        given = seen if cache is None else likeliest  # not every model of its own code has a cache
        written.append(likeliest[:, 0].tolist())
        if all(not ends.isdisjoint(text) for text in zip(*written, strict=True)):
            break
    return [_to_its_end(list(text), ends) for text in zip(*written, strict=True)]


def _to_its_end(text: list[int], ends: frozenset[int]) -> list[int]:
    return next((text[: i + 1] for i, token in enumerate(text) if token in ends), text)
