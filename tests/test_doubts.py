"""Which whole models are not trusted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT, random_llama

from finercut.evaluation.doubts import doubts
from finercut.evaluation.harness import fit
from finercut.evaluation.records import Score


class Foresees:
    """Gives each next token these logits over the others', in windows that begin with `first` only."""

    config = random_llama().config
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, nats: float, first: int | None = None) -> None:
        self.nats, self.first = nats, first

    def __call__(self, tokens, use_cache):
        known = self.first in (None, tokens[0, 0].item())
        return SimpleNamespace(logits=torch.nn.functional.one_hot(tokens.roll(-1), 400) * (self.nats if known else 2.0))


@pytest.fixture(scope="module")
def windows(tokenizer):
    ids = tokenizer(" ".join(TEXT), add_special_tokens=False).input_ids
    return torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)


def found(model, tokenizer, windows, **scores):
    return doubts(model, tokenizer, windows, fit(model, tokenizer, windows), scores)


def score(value: float, chance: float | None) -> Score:
    counts = {"n_samples": 8, "n_available": 8, "n_fewshot": 0}
    return Score(value=value, stderr=None, higher_is_better=True, chance=chance, **counts)


def test_a_model_in_order_is_not_doubted(tokenizer, windows):
    assert found(Foresees(9.0), tokenizer, windows, a=score(0.51, 0.5), b=score(0.0, None)) == []


def test_a_model_that_knows_no_more_than_nothing_is_doubted(tokenizer, windows):
    (doubt,) = found(Foresees(0.0), tokenizer, windows)
    assert doubt == "its perplexity on the held-out text is 400; one that knows nothing of 400 tokens has 400"


def test_a_model_that_a_compressor_beats_is_doubted(tokenizer, windows):
    # The same text again and again is easy to compress, and no easier to this model.
    (doubt,) = found(Foresees(2.0), tokenizer, windows.repeat(20, 1))
    assert "bits a byte of the held-out text; bzip2 needs" in doubt


def test_a_model_that_predicts_better_after_bos_is_doubted(tokenizer, windows):
    (doubt,) = (d for d in found(Foresees(9.0, first=0), tokenizer, windows) if "put first" in d)
    assert "with <s> put first" in doubt
    assert "add_bos_token" in doubt


def test_a_score_of_guessing_is_doubted(tokenizer, windows):
    (doubt,) = found(Foresees(9.0), tokenizer, windows, task=score(0.25, 0.25))
    assert doubt == "task is 0.250, no better than guessing (0.250)"
