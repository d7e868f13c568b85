"""Judges a whole model by its own figures: one that is broken makes every comparison with it worthless.

A lost BOS token, wrong rotary settings or a foreign tokenizer raise no error. They show in the figures.
"""

from __future__ import annotations

import bz2
from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finercut.evaluation.harness import Fit, fit
from finercut.evaluation.records import Score

BOS_MARGIN = 1.5
"""Times that the perplexity falls with BOS put first, from which on a model is taken to need it."""
N_WINDOWS = 4
"""Held-out windows that BOS is tried on."""


def doubts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    found: Fit,
    scores: Mapping[str, Score],
) -> list[str]:
    """What speaks against the whole model, a sentence each; empty for one that is in order.

    Args:
        windows: held-out token ids, (samples, tokens)
        found: how well the model predicts them
        scores: by task
    """
    return [*_fit(model, tokenizer, windows, found), *_bos(model, tokenizer, windows), *_chance(scores)]


def _fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, found: Fit) -> list[str]:
    vocab_size = model.config.get_text_config().vocab_size
    if found.perplexity > vocab_size / 2:
        return [
            f"its perplexity on the held-out text is {found.perplexity:.0f}; one that knows nothing of {vocab_size} "
            f"tokens has {vocab_size}"
        ]
    # bzip2 knows no language, and has to learn the text's statistics as it goes.
    text = tokenizer.decode(windows.flatten(), clean_up_tokenization_spaces=False).encode()
    packed = 8 * len(bz2.compress(text)) / max(len(text), 1)
    if found.bits_per_byte > packed:
        return [f"it needs {found.bits_per_byte:.2f} bits a byte of the held-out text; bzip2 needs {packed:.2f}"]
    return []


def _bos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor) -> list[str]:
    bos = tokenizer.bos_token_id
    if bos is None or bos >= model.config.get_text_config().vocab_size or tokenizer("x").input_ids[:1] == [bos]:
        return []
    tried = windows[:N_WINDOWS]
    # The first token is predicted in neither case: what is compared is the same tokens.
    without = fit(model, tokenizer, tried).perplexity
    led = fit(model, tokenizer, tried, start=bos).perplexity
    if led * BOS_MARGIN > without:
        return []
    return [
        f"its perplexity is {led:.1f} with {tokenizer.bos_token} put first, and {without:.1f} as its tokenizer does "
        "it: set add_bos_token to true in tokenizer_config.json of the source and fetch again"
    ]


def _chance(scores: Mapping[str, Score]) -> Sequence[str]:
    return [
        f"{task} is {score.value:.3f}, no better than guessing ({score.chance:.3f})"
        for task, score in scores.items()
        if score.chance is not None and score.value <= score.chance
    ]
