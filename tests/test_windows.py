"""Windows cut from texts, and the file they are in, against the tokenizer alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TEXT
from hub_server import ROOT
from hypothesis import given
from hypothesis import strategies as st
from lettered import LETTERS, letters_of, texts, windows

from finercut.sources.settings import apportion
from finercut.sources.texts import Texts
from finercut.sources.windows import Cut, cut_windows
from finercut.tokens import Tokens, load_tokens, passages, repeat, write_tokens

# Windows


def test_without_shuffling_the_windows_are_the_first_of_the_joined_text(tokenizer):
    rows = ["", " = Title = \n", "", *TEXT]
    found = windows(texts(rows), tokenizer, n_samples=3)
    ids = tokenizer(" ".join(rows)).input_ids
    assert found.calibration.flatten().tolist() == ids[:24]
    assert found.calibration.shape == (3, 8)
    assert found.calibration.dtype == torch.int64


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_held_out_windows_come_from_documents_no_calibration_window_touches(tokenizer, seed):
    found = windows(texts(LETTERS), tokenizer, n_tokens=10, n_samples=5, n_held_out_samples=6, shuffle_seed=seed)
    seen, unseen = letters_of(found.calibration, tokenizer), letters_of(found.held_out, tokenizer)
    assert len(seen) > 1
    assert len(unseen) > 1
    assert not seen & unseen


def test_held_out_windows_start_right_after_the_last_document_used(tokenizer):
    found = windows(texts(LETTERS), tokenizer, n_tokens=12, n_samples=4)
    calibration_ids = [len(tokenizer(" ".join(LETTERS[:k])).input_ids) for k in range(27)]
    n_used = next(k for k in range(27) if calibration_ids[k] >= 48)
    assert found.held_out.flatten().tolist() == tokenizer(" ".join(LETTERS[n_used:])).input_ids[:24]


def test_a_document_that_is_repeated_is_not_held_out(tokenizer):
    found = windows(
        texts([*LETTERS[:6], *LETTERS[:6], *LETTERS[6:20]]), tokenizer, n_tokens=40, n_samples=1, n_held_out_samples=6
    )
    assert not letters_of(found.calibration, tokenizer) & letters_of(found.held_out, tokenizer)


def test_blanks_around_a_document_do_not_make_it_another(tokenizer):
    padded = [f" {document}\n" for document in LETTERS[:6]]
    documents = texts([*LETTERS[:6], *padded, *LETTERS[6:20]])
    found = windows(documents, tokenizer, n_tokens=40, n_samples=1, n_held_out_samples=6)
    assert not letters_of(found.calibration, tokenizer) & letters_of(found.held_out, tokenizer)


def test_windows_of_documents_that_begin_alike_are_for_one_use_only(tokenizer):
    alike = [f"{LETTERS[0]} {letter}" for letter in LETTERS[1:13]]
    cut = Cut(texts(alike), 1, 2, 2)
    found = cut_windows([cut], tokenizer, n_tokens=8, shuffle_seed=None)
    uses = [{tuple(row) for row in part.tolist()} for part in (found.calibration, found.held_out, found.healing)]
    assert uses[0] == {tuple(tokenizer(LETTERS[0]).input_ids[:8])}
    assert not uses[0] & uses[1]
    assert not (uses[0] | uses[1]) & uses[2]


def test_texts_that_are_all_alike_are_said_to_be(tokenizer):
    with pytest.raises(ValueError, match=r"held-out windows need \d+, \d+ of them alike to others: give more text"):
        windows(texts([" ".join(["A"] * 12 * n) for n in range(1, 9)]), tokenizer, n_tokens=24, n_samples=1)


def test_a_seed_shuffles_documents_and_always_the_same_way(tokenizer):
    first, again = (windows(texts(LETTERS), tokenizer, shuffle_seed=3) for _ in range(2))
    assert torch.equal(first.calibration, again.calibration)
    assert first.calibration_sha256 == again.calibration_sha256
    assert not torch.equal(first.calibration, windows(texts(LETTERS), tokenizer).calibration)
    assert not torch.equal(first.calibration, windows(texts(LETTERS), tokenizer, shuffle_seed=4).calibration)


def test_every_window_starts_with_bos_where_the_tokenizer_wants_one(tokenizer, bos_tokenizer):
    found = windows(texts(TEXT), bos_tokenizer, n_tokens=9, n_samples=3)
    assert found.calibration[:, 0].tolist() == [0, 0, 0]
    assert found.held_out[:, 0].tolist() == [0, 0]
    assert found.calibration[:, 1:].flatten().tolist() == tokenizer(" ".join(TEXT)).input_ids[:24]


def test_too_little_text_says_how_much_there_is_and_what_to_change(tokenizer):
    n = len(tokenizer(" ".join(TEXT)).input_ids)
    with pytest.raises(
        ValueError, match=rf"{n} tokens in 5 documents, 99 calibration windows need 792: give more text"
    ):
        windows(texts(TEXT), tokenizer, n_samples=99)
    with pytest.raises(ValueError, match=r"0 tokens in 0 documents that calibration does not use, 2 held-out windows"):
        windows(texts(TEXT[:1]), tokenizer)


# Several sources


def named(name: str, *documents: str) -> Texts:
    return Texts(list(documents), " ", name, name)


@pytest.mark.parametrize(
    ("n", "shares", "expected"),
    [
        (8, [1], [8]),
        (8, [1, 1], [4, 4]),
        (8, [5, 3], [5, 3]),
        (10, [1, 1, 1], [4, 3, 3]),  # equal remainders: the first one
        (10, [0.5, 0.3, 0.26], [5, 3, 2]),  # 4.72, 2.83, 2.45
        (3, [100, 1, 1], [3, 0, 0]),
        (7, [0.1, 0.2, 0.7], [1, 1, 5]),  # 0.7, 1.4, 4.9
    ],
)
def test_windows_are_apportioned_by_largest_remainder(n, shares, expected):
    assert apportion(n, shares) == expected


@given(n=st.integers(1, 200), shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_no_source_is_a_whole_window_from_its_share(n, shares):
    counts = apportion(n, shares)
    assert sum(counts) == n
    assert all(abs(count - n * share / sum(shares)) < 1 for count, share in zip(counts, shares, strict=True))


def test_every_window_says_which_source_it_was_cut_from(tokenizer):
    a, b = named("a", *LETTERS[:13]), named("b", *LETTERS[13:])
    found = cut_windows([Cut(a, 4, 1), Cut(b, 2, 3)], tokenizer, n_tokens=5, shuffle_seed=None)
    assert found.sources == ("a", "b")
    assert found.calibration_sources.tolist() == [0, 1, 0, 0, 1, 0]  # in turn, so that the first have all shares
    assert sorted(found.held_out_sources.tolist()) == [0, 1, 1, 1]
    for windows_, of_source in (
        (found.calibration, found.calibration_sources),
        (found.held_out, found.held_out_sources),
    ):
        for window, source in zip(windows_, of_source.tolist(), strict=True):
            letters = letters_of(window, tokenizer)
            assert letters
            assert all((letter < "N") == (source == 0) for letter in letters)


def test_several_sources_give_the_windows_that_each_would_give_alone(tokenizer):
    a, b = named("a", *LETTERS[:13]), named("b", *LETTERS[13:])
    both = cut_windows([Cut(a, 4, 2), Cut(b, 2, 3)], tokenizer, n_tokens=5, shuffle_seed=1)
    for source, cut in enumerate((Cut(a, 4, 2), Cut(b, 2, 3))):
        alone = cut_windows([cut], tokenizer, n_tokens=5, shuffle_seed=1)
        assert torch.equal(both.calibration[both.calibration_sources == source], alone.calibration)
        assert torch.equal(both.held_out[both.held_out_sources == source], alone.held_out)


def test_a_document_that_calibrates_in_one_source_is_held_out_in_none(tokenizer):
    a, b = named("a", *LETTERS[:6]), named("b", *LETTERS[:4], *LETTERS[20:])
    found = cut_windows([Cut(a, 3, 1), Cut(b, 0, 4)], tokenizer, n_tokens=10, shuffle_seed=None)
    assert not letters_of(found.calibration, tokenizer) & letters_of(found.held_out, tokenizer)


def test_a_source_for_held_out_windows_only_gives_no_calibration_window(tokenizer):
    a, b = named("a", *LETTERS[:13]), named("b", *LETTERS[13:])
    found = cut_windows([Cut(a, 4, 2), Cut(b, 0, 2)], tokenizer, n_tokens=5, shuffle_seed=None)
    assert found.calibration_sources.tolist() == [0] * 4
    assert sorted(found.held_out_sources.tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize("seed", [None, 3])
def test_healing_windows_come_from_every_source_and_from_documents_that_nothing_else_uses(tokenizer, seed):
    # Half of the documents of one are in the other, too.
    a, b, c = named("a", *LETTERS[:14]), named("b", *LETTERS[7:22]), named("c", *LETTERS[22:])
    cuts = [Cut(a, 2, 1, 3), Cut(b, 1, 1, 2), Cut(c, 0, 2)]
    found = cut_windows(cuts, tokenizer, n_tokens=10, shuffle_seed=seed)
    assert sorted(found.healing_sources.tolist()) == [0, 0, 0, 1, 1]
    assert found.unseen == ("c",)
    uses = [letters_of(windows, tokenizer) for windows in found.named().values()]
    assert len(uses) == 3
    assert all(uses)
    assert not uses[0] & uses[1]
    assert not (uses[0] | uses[1]) & uses[2]
    # Healing takes what the others leave.
    without = cut_windows(
        [replace(cut, n_healing_samples=0) for cut in cuts], tokenizer, n_tokens=10, shuffle_seed=seed
    )
    assert without.healing is None
    assert without.calibration_sha256 == found.calibration_sha256
    assert without.held_out_sha256 == found.held_out_sha256


def test_a_repeated_source_puts_each_passage_twice_in_a_row(tokenizer):
    text = named("a", *LETTERS)
    options = {"n_tokens": 6, "shuffle_seed": None}
    ids = cut_windows([Cut(text, 2, 1)], tokenizer, **options).calibration.flatten().tolist()
    found = cut_windows([Cut(text, 2, 1, repeated=[1, 2])], tokenizer, **options)
    assert found.calibration.tolist() == [[ids[i] for i in (0, 0, 1, 2, 1, 2)], [ids[i] for i in (3, 3, 4, 5, 4, 5)]]
    assert found.sources == ("a, repeated",)


def test_the_last_passage_is_cut_where_the_window_ends():
    assert passages([4, 8], 20) == [4, 8]
    assert passages([4, 8], 25) == [4, 8, 4]
    assert passages([], 20) == []
    assert repeat(range(12), [4, 8])[:10] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


def test_sources_of_one_name_are_told_apart(tokenizer):
    cuts = [Cut(named(name, *LETTERS[i : i + 6]), 1, 1) for name, i in (("a", 0), ("b", 6), ("a", 12))]
    assert cut_windows(cuts, tokenizer, n_tokens=5, shuffle_seed=None).sources == ("a", "b", "a (2)")


def test_a_source_too_small_for_healing_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"^b has \d+ tokens in \d+ documents that nothing else uses, 99 heal"):
        cut_windows([Cut(named("b", *LETTERS), 1, 1, 99)], tokenizer, n_tokens=10, shuffle_seed=None)


def test_the_source_that_is_too_small_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"^b has \d+ tokens in 1 documents, 9 calibration windows need 90"):
        cut_windows(
            [Cut(named("a", *LETTERS), 1, 1), Cut(named("b", LETTERS[0]), 9, 1)],
            tokenizer,
            n_tokens=10,
            shuffle_seed=None,
        )


# The token file


def test_the_token_file_is_read_as_written_and_has_the_same_bytes_again(tmp_path):
    tokens = Tokens(torch.arange(12).reshape(3, 4), torch.arange(8).reshape(2, 4))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tokens(tmp_path / name, tokens, {"source": "s", "revision": "r"})
    file = tmp_path / "a" / "tokens.safetensors"
    assert file.read_bytes() == (tmp_path / "b" / "tokens.safetensors").read_bytes()
    found = load_tokens(tmp_path / "a")
    assert torch.equal(found.calibration, tokens.calibration)
    assert torch.equal(found.held_out, tokens.held_out)
    assert found.calibration_sha256 != found.held_out_sha256
    assert Tokens(tokens.calibration.reshape(4, 3), tokens.held_out).calibration_sha256 != tokens.calibration_sha256
    damaged = bytearray(file.read_bytes())
    damaged[-8] += 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged"):
        load_tokens(tmp_path / "a")
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a token file"):
        load_tokens(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="run `finercut calibrate` first"):
        load_tokens(tmp_path)


def test_the_token_file_keeps_the_source_of_every_window(tmp_path):
    tokens = Tokens(
        torch.arange(12).reshape(3, 4),
        torch.arange(8).reshape(2, 4),
        torch.arange(16).reshape(4, 4),
        torch.tensor([0, 1, 0]),
        torch.tensor([2, 1]),
        torch.tensor([1, 0, 0, 1]),
        ("prose", "dialogue", "unlike"),
        ("unlike",),
    )
    write_tokens(tmp_path, tokens, {"source": "s"})
    found = load_tokens(tmp_path)
    assert (found.sources, found.unseen) == (("prose", "dialogue", "unlike"), ("unlike",))
    assert found.calibration_sources.tolist() == [0, 1, 0]
    assert found.held_out_sources.tolist() == [2, 1]
    assert found.healing_sources.tolist() == [1, 0, 0, 1]
    assert torch.equal(found.healing, tokens.healing)
    # Of the same windows it stays what it was: a search goes on, a champion's held-out windows are compared.
    assert found.calibration_sha256 == Tokens(tokens.calibration, tokens.held_out).calibration_sha256


def test_windows_of_which_nothing_is_said_are_of_the_first_source():
    tokens = Tokens(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))
    assert (tokens.calibration_sources.tolist(), tokens.held_out_sources.tolist()) == ([0] * 3, [0] * 2)
    assert len(tokens.sources) == 1


def test_a_token_file_of_version_0_1_is_of_one_source():
    found = load_tokens(ROOT / "tests" / "fixtures" / "v0_1" / "calibration")
    assert len(found.sources) == 1
    assert set(found.calibration_sources.tolist()) == set(found.held_out_sources.tolist()) == {0}
