"""Controls after a removal, against transformers' own generation and full forwards of the masked model."""

import pytest
import torch
from conftest import random_llama

from finercut.model.masking import masked
from finercut.model.workers import Workers
from finercut.selection.bench import Bench
from finercut.selection.controls import Continuations, end_tokens, greedy
from finercut.selection.distributed import ALONE
from finercut.selection.greedy import search
from finercut.sublayers import parse
from finercut.tokens import repetition

CPU = torch.device("cpu")
REMOVED = [s for name in ("0.attention", "2.mlp") for s in parse(name).sublayers]


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def continued(model, tokens):
    """(2, 20) tokens that generate() adds to 12 of two windows, without ends."""
    with masked(model, REMOVED):
        whole = model.generate(tokens[4:, :12], do_sample=False, max_new_tokens=20, min_new_tokens=20, eos_token_id=[])
    return whole[:, 12:].tolist()


def test_agreement_is_the_share_of_most_likely_tokens_that_stay(model, tokens):
    removed = parse("3.attention").sublayers
    with torch.no_grad():
        whole = model(tokens[4:]).logits.argmax(-1)
        with masked(model, removed):
            expected = (model(tokens[4:]).logits.argmax(-1) == whole).double().mean().item()
    for tokens_at_once in (None, 16):
        with Bench(model, tokens[:4], tokens[4:], removed=removed, micro_batch_tokens=tokens_at_once) as bench:
            divergence, _, controls = bench.held_out_controls()
            assert divergence == bench.held_out_divergence()
        assert controls.agreement == pytest.approx(expected)
        assert 0 < expected < 1
        assert controls.repetition is controls.missing_ends is None


def test_every_removal_of_a_search_has_its_controls(model, tokens):
    first, second = search(model, tokens[:4], tokens[4:], 2, continuations=Continuations(tokens[4:], 2, 8))
    for removals in ([first], [first, second]):
        with Bench(
            model,
            tokens[:4],
            tokens[4:],
            removed=[s for r in removals for s in parse(r.sublayer).sublayers],
            continuations=Continuations(tokens[4:], 2, 8),
        ) as bench:
            assert removals[-1].controls == bench.held_out_controls()[2]
    assert first.controls.whole_repetition == second.controls.whole_repetition


def test_continuations_are_those_of_generate(model, tokens, continued):
    with masked(model, REMOVED):
        assert greedy(model, tokens[4:, :12], 20, frozenset()) == continued


def test_a_text_ends_with_its_end_token(model, tokens, continued):
    # a token that the first text has and the second has not
    end = next(t for t in continued[0] if t not in continued[1])
    with masked(model, REMOVED):
        first, second = greedy(model, tokens[4:, :12], 20, frozenset([end]))
    assert first == continued[0][: continued[0].index(end) + 1]
    assert second == continued[1]


def test_repetition_and_missing_ends_are_means_over_the_continuations(tokens, continued):
    model = random_llama()
    end = next(t for t in continued[0] if t not in continued[1])
    texts = [continued[0][: continued[0].index(end) + 1], continued[1]]
    model.generation_config.eos_token_id = [end, 399]
    with Workers(CPU) as workers:
        found = Continuations(tokens[4:], 4, 20).of(model, REMOVED, workers, ALONE)
        of_whole = Continuations(tokens[4:], 4, 20).of(model, (), workers, ALONE)
    assert found["repetition"] == pytest.approx(sum(map(repetition, texts)) / 2)
    assert found["missing_ends"] == 0.5
    assert found["whole_repetition"] == of_whole["repetition"] == of_whole["whole_repetition"]
    assert found["whole_missing_ends"] == of_whole["missing_ends"]


def test_repetition_by_hand():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 1234 2341 3412 4123 1234
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition(range(9)) == repetition([1, 1, 1, 1]) == repetition([]) == 0


def test_a_model_without_an_end_token_misses_none(tokens):
    model = random_llama()
    model.generation_config.eos_token_id = None
    assert end_tokens(model) == frozenset()
    with Workers(CPU) as workers:
        found = Continuations(tokens[4:], 1, 5).of(model, (), workers, ALONE)
    assert found["missing_ends"] is found["whole_missing_ends"] is None
