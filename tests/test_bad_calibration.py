"""Damaged tokens and texts, through the commands: one line, a status that is not 0, and nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_input import refused, set_params
from conftest import TEXT, random_llama
from safetensors.torch import load_file, save_file

from finercut.tokens import load_tokens
from pipelines import paths


def sha256(windows: torch.Tensor) -> str:
    shape = " ".join(map(str, windows.shape))
    return hashlib.sha256(f"{shape}\n".encode() + windows.numpy().astype("<i8").tobytes()).hexdigest()


def stored(**changes: object) -> Callable[[], None]:
    """The token file with other tensors, their hashes recorded as if they were right."""

    def damage() -> None:
        found = load_tokens(paths.CALIBRATION)
        fields = {"calibration": found.calibration, "held_out": found.held_out} | changes
        shutil.rmtree(paths.CALIBRATION)
        paths.CALIBRATION.mkdir()
        recorded = {f"{name}_sha256": sha256(windows) for name, windows in fields.items()}
        save_file(fields, paths.CALIBRATION / "tokens.safetensors", {"finercut": json.dumps(recorded)})

    return damage


def token_file(written: bytes) -> Callable[[], object]:
    return lambda: TOKENS.write_bytes(written)


def metadata(recorded: object) -> Callable[[], None]:
    def damage() -> None:
        save_file(load_file(TOKENS), TOKENS, recorded)

    return damage


TOKENS = paths.CALIBRATION / "tokens.safetensors"
TOKEN_FILES: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (TOKENS.unlink, "run `finercut calibrate` first"),
    "empty": (token_file(b""), "is not a token file"),
    "text": (token_file(b"1 2 3 4 5 6 7 8"), "is not a token file"),
    "cut": (lambda: os.truncate(TOKENS, TOKENS.stat().st_size - 8), "is not a token file"),
    "one bit": (lambda: TOKENS.write_bytes(TOKENS.read_bytes()[:-1] + b"\1"), "is damaged"),
    "a model": (lambda: shutil.copy("mine/model.safetensors", TOKENS), "is not a token file"),
    "no metadata": (metadata(None), "is not a token file"),
    "metadata not JSON": (metadata({"finercut": "{"}), "is not a token file"),
    "metadata a list": (metadata({"finercut": "[]"}), "is not a token file"),
    "no hashes": (metadata({"finercut": "{}"}), "is not a token file"),
    "one row": (stored(held_out=torch.arange(16)), "does not hold windows of tokens"),
    "no windows": (stored(held_out=torch.zeros(0, 16, dtype=torch.int64)), "does not hold windows of tokens"),
    "other numbers": (stored(calibration=torch.zeros(2, 16)), "does not hold windows of tokens"),
    "below zero": (stored(calibration=torch.full((2, 16), -1)), "does not hold windows of tokens"),
    "beyond the vocabulary": (stored(held_out=torch.full((2, 16), 400)), "token 400, the model knows 400"),
}


@pytest.mark.parametrize("stage", ["search", "evaluate_whole"])
@pytest.mark.parametrize(("damage", "message"), TOKEN_FILES.values(), ids=TOKEN_FILES)
def test_a_token_file_that_is_none(workspace, stage, damage, message):
    damage()
    assert message in refused(stage)


def row(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


GOOD = "\n\n".join(TEXT * 6).encode()
TEXTS: dict[str, tuple[str, bytes, str]] = {
    "no such kind": ("text.pdf", GOOD, "is none of .txt, .jsonl"),
    "no suffix": ("text", GOOD, "is none of .txt, .jsonl"),
    "empty": ("text.txt", b"", "is empty"),
    "blank": ("text.txt", b" \n\n\t\n", "is empty"),
    "latin-1": ("text.txt", GOOD + b"caf\xe9 ", "is not UTF-8 (byte"),
    "utf-16": ("text.txt", GOOD.decode().encode("utf-16"), "is not UTF-8 (byte 0)"),
    "binary": ("text.txt", bytes(range(256)) * 8, "is not UTF-8 (byte"),
    "too short": ("text.txt", GOOD[:100], "give more text"),
    "one document": ("text.txt", GOOD.replace(b"\n\n", b" "), "that calibration does not use"),
    "not JSON": ("text.jsonl", row({"text": "a"}) + b"{text: b}\n", "line 2 is not JSON"),
    "deep": ("text.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    "a list": ("text.jsonl", row(["a"]), "line 1 has no column 'text'"),
    "a number": ("text.jsonl", row(4), "line 1 has no column 'text'"),
    "other column": ("text.jsonl", row({"content": "a"}), "has no column 'text', only content"),
    "column gone later": ("text.jsonl", row({"text": "a"}) + row({"body": "b"}), "line 2 has no column"),
    "null": ("text.jsonl", row({"text": None}), "row 1 holds NoneType"),
    "a number in it": ("text.jsonl", row({"text": "a"}) + row({"text": 4}), "row 2 holds int"),
    "half a character": ("text.jsonl", row({"text": TEXT[0]}) * 9 + b'{"text": "\\ud800"}\n', "row 10 holds half"),
    "torn": ("text.jsonl", row({"text": "a"}) + b'{"text": "b', "line 2 is not JSON"),
    "not parquet": ("text.parquet", GOOD, "is not a parquet file"),
    "parquet empty": ("text.parquet", b"", "is not a parquet file"),
    "parquet cut": ("text.parquet", b"PAR1" + bytes(40), "is not a parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_cannot_be_used(workspace, name, content, message):
    Path("text.txt").unlink()
    Path(name).write_bytes(content)
    set_params(calibrate__source={"kind": "files", "paths": [name]})
    assert message in refused("calibrate")


def parquet(columns: dict[str, list]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), "text.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": TEXT}, "has no column 'text', only content"),
        ({"text": [1, 2]}, "row 1 holds int"),
        ({"text": ["a", None]}, "row 2 holds NoneType"),
        ({"text": [["a"]]}, "row 1 holds list"),
        ({"text": [b"\xff"]}, "row 1 holds bytes"),
        ({}, "has no column 'text'"),
    ],
)
def test_a_parquet_file_without_text(workspace, columns, message):
    parquet(columns)
    set_params(calibrate__source={"kind": "files", "paths": ["text.parquet"]})
    assert message in refused("calibrate")


def test_a_parquet_file_whose_pages_are_damaged(workspace):
    parquet({"text": TEXT * 50})
    whole = bytearray(Path("text.parquet").read_bytes())
    whole[20:200] = bytes(180)
    Path("text.parquet").write_bytes(whole)
    set_params(calibrate__source={"kind": "files", "paths": ["text.parquet"]})
    assert "text.parquet" in refused("calibrate")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibrate__n_tokens": 257}, "calibrate.n_tokens = 257 is more than the model's context of 256"),
        ({"calibrate__n_samples": 10**9}, "give more text"),
        (
            {"calibrate__source": {"kind": "files", "paths": ["."]}},
            "no file ., it is a folder: name its files, as *.txt does",
        ),
        ({"calibrate__source": {"kind": "files", "paths": ["no.txt"]}}, "no file no.txt"),
        ({"calibrate__source": {"kind": "package", "name": "no-such-text", "version": "1"}}, "pip install no-such"),
        ({"calibrate__source": {"kind": "package", "name": "click", "version": "0"}}, "is installed, not 0"),
    ],
)
def test_a_calibration_that_cannot_be_cut(workspace, change, message):
    set_params(**change)
    assert message in refused("calibrate")


TEXT_FILE = {"kind": "files", "paths": ["text.txt"]}
OWN = {"kind": "model", "device": "cpu", "max_tokens": 16}


def several(*sources: dict, **changes: object) -> dict:
    return {"calibrate__source": None, "calibrate__sources": list(sources)} | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (several(TEXT_FILE | {"share": 0}), "sources.0.share: Input should be greater than 0"),
        (several(TEXT_FILE, TEXT_FILE | {"share": -1}), "sources.1.share: Input should be greater than 0"),
        (several(TEXT_FILE | {"share": "half"}), "sources.0.share"),
        (several(), "calibrate.sources: List should have at least 1"),
        (several(TEXT_FILE, calibrate__source=TEXT_FILE), "calibrate: give either source or sources"),
        ({"calibrate__source": None}, "calibrate: give either source or sources"),
        (several(TEXT_FILE | {"repeated": [0]}), "sources.0.repeated.0: Input should be greater than 0"),
        (several(TEXT_FILE | {"repeated": [4, 9999]}), "no window of n_tokens"),
        (several(TEXT_FILE, TEXT_FILE, TEXT_FILE), "n_samples = 2 leaves no window for text.txt with its share of 1"),
        (several(TEXT_FILE, OWN | {"share": 0.1}), "n_samples = 2 leaves no window for the model's own text with its"),
        (
            several(TEXT_FILE, TEXT_FILE | {"share": 0.1}, calibrate__n_healing_samples=1, calibrate__n_samples=30)
            | {"calibrate__n_held_out_samples": 30},
            "n_healing_samples = 1 leaves no window for text.txt with its share of 0.1",
        ),
        (
            several(TEXT_FILE, TEXT_FILE | {"share": 2.0}, calibrate__n_samples=3),
            "text.txt is named twice: give it one",
        ),
        ({"calibrate__unseen": TEXT_FILE}, "give it one entry, with both shares; as unseen, no other"),
        ({"calibrate__unseen": TEXT_FILE | {"share": 0.1}}, "n_held_out_samples = 2 leaves no window for text.txt"),
        (several(TEXT_FILE, {"kind": "files", "paths": ["a.txt"]}), "no file a.txt"),
        (several(TEXT_FILE, {"kind": "book", "paths": ["a.txt"]}), "calibrate.sources.1"),
        (several(OWN | {"start": "<|im_start|>"}), "start: '<|im_start|>', which is no token of the model's tokenizer"),
        (several(OWN | {"prompts": ["Why?"]}), "whose tokenizer has no chat template"),
        (several(OWN | {"prompts": ["Why?"], "start": "<s>"}), "give prompts or start, not both"),
        (several(OWN | {"max_tokens": 256}), "lower max_tokens in calibrate"),
        (several(OWN | {"temperature": 0}), "sources.0.temperature: Input should be greater than 0"),
        (several(OWN | {"top_p": 1.5}), "sources.0.top_p"),
        (several(OWN | {"device": "cuda:7"}), "no device 'cuda:7' here"),
    ],
)
def test_sources_that_cannot_be_used(workspace, change, message):
    set_params(**change)
    assert message in refused("calibrate")


def test_a_model_that_writes_nothing(workspace):
    flat = random_llama()
    torch.nn.init.zeros_(flat.model.norm.weight)
    flat.save_pretrained(paths.MODEL)
    set_params(**several(TEXT_FILE, OWN | {"top_p": 1e-6}))
    assert "are empty and 0 repeat themselves; 0 with 0 tokens are left" in refused("calibrate")


def test_a_window_of_no_source(workspace):
    found = load_tokens(paths.CALIBRATION)
    indices = {"calibration_sources": torch.tensor([0, 1]), "held_out_sources": found.held_out_sources}
    fields = {"calibration": found.calibration, "held_out": found.held_out} | indices
    recorded = {f"{name}_sha256": sha256(windows) for name, windows in fields.items()} | {"sources": ["text.txt"]}
    save_file(fields, TOKENS, {"finercut": json.dumps(recorded)})
    assert "names no source for some of its windows" in refused("search")


@pytest.mark.parametrize(
    "indices", [torch.tensor([0]), torch.tensor([0.0, 0.0]), torch.tensor([[0], [0]]), torch.tensor([True, False])]
)
def test_windows_and_sources_that_do_not_belong_together(workspace, indices):
    found = load_tokens(paths.CALIBRATION)
    fields = {"calibration": found.calibration, "held_out": found.held_out, "held_out_sources": found.held_out_sources}
    fields["calibration_sources"] = indices
    recorded = {f"{name}_sha256": sha256(windows) for name, windows in fields.items()} | {"sources": ["text.txt"]}
    save_file(fields, TOKENS, {"finercut": json.dumps(recorded)})
    assert "does not say where its windows are from" in refused("search")
