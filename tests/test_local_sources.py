"""Models from a directory, and what later runs take a source for that was edited."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_llama
from fetching import copy_of, fetched_by_stage, params
from hub_server import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from finercut.model.tensors import weights_sha256
from finercut.sources import gguf, revisions
from finercut.sources.models import fetch_model
from finercut.sources.settings import FilesText, HubModel, LocalModel
from finercut.sources.texts import read_texts
from pipelines import fetch, paths
from pipelines.params import load

pytestmark = pytest.mark.usefixtures("without_vllm")


def test_a_local_model_arrives_whole_and_alone(tiny_model, tmp_path, monkeypatch):
    mine = copy_of(tiny_model, tmp_path / "mine")
    for stray in ("pytorch_model.bin", "modeling_mine.py", "notes.md", "consolidated.safetensors"):
        (mine / stray).write_bytes(b"x")
    report = fetched_by_stage({"kind": "local", "path": mine}, tmp_path, monkeypatch)
    assert sorted(file.name for file in paths.MODEL.iterdir()) == sorted(file.name for file in tiny_model.iterdir())
    whole = random_llama()
    assert report.n_parameters == sum(p.numel() for p in whole.parameters())
    assert (report.n_blocks, report.vocab_size, report.max_position_embeddings) == (4, 400, 256)
    assert (report.dtype, report.source) == ("float32", str(mine))
    loaded = AutoModelForCausalLM.from_pretrained(paths.MODEL).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in whole.state_dict().items())
    assert fetch.FetchReport.read(paths.report("fetch")) == report


def test_a_fetched_model_shares_no_file_with_the_users_own(tiny_model, tmp_path, monkeypatch):
    fetched_by_stage({"kind": "local", "path": tiny_model}, tmp_path, monkeypatch)
    for file in paths.MODEL.iterdir():
        assert file.stat().st_ino != (tiny_model / file.name).stat().st_ino
        assert file.stat().st_nlink == 1


def test_the_revision_of_a_directory_changes_with_any_file_taken(tiny_model, tmp_path):
    def origin(directory: Path, name: str):
        (tmp_path / name).mkdir()
        return fetch_model(LocalModel(kind="local", path=directory), tmp_path / name, tmp_path / "work")

    again = copy_of(tiny_model, tmp_path / "again")
    (again / "notes.txt").write_text("not taken")
    shutil.copyfile(tiny_model / "config.json", again / "config.json")
    other = copy_of(tiny_model, tmp_path / "other", rope_theta=5.0)
    assert origin(tiny_model, "a").revision == origin(again, "b").revision != origin(other, "c").revision


def test_sharded_weights_are_the_same_model(tiny_model, tmp_path, monkeypatch):
    sharded = copy_of(tiny_model, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    random_llama().save_pretrained(sharded, max_shard_size="300KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    report = fetched_by_stage({"kind": "local", "path": sharded}, tmp_path, monkeypatch)
    assert report.n_parameters == sum(p.numel() for p in random_llama().parameters())
    last = sorted(sharded.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ValueError, match=rf"index\.json names '{last.name}', which is not a shard"):
        fetch.run(params({"kind": "local", "path": sharded}))
    assert fetch.FetchReport.read(paths.report("fetch")) == report  # the earlier model is still there, whole
    assert weights_sha256(paths.MODEL) == report.sha256


@pytest.mark.parametrize(
    "name", ["model-{}-of-{}", "model.safetensors-0000{}-of-0000{}", "pytorch_model-0000{}-of-0000{}"]
)
def test_shards_may_have_other_names_than_transformers_gives_them(tiny_model, tmp_path, monkeypatch, name):
    mine = copy_of(tiny_model, tmp_path / "mine")
    (mine / "model.safetensors").unlink()
    random_llama().save_pretrained(mine, max_shard_size="300KB")
    shards = sorted(mine.glob("*.safetensors"))
    renamed = {s.name: name.format(i, len(shards)) + ".safetensors" for i, s in enumerate(shards, start=1)}
    index = json.loads((mine / "model.safetensors.index.json").read_text())
    index["weight_map"] = {tensor: renamed[shard] for tensor, shard in index["weight_map"].items()}
    (mine / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in shards:
        shard.rename(mine / renamed[shard.name])
    report = fetched_by_stage({"kind": "local", "path": mine}, tmp_path, monkeypatch)
    assert report.n_parameters == sum(p.numel() for p in random_llama().parameters())
    loaded = AutoModelForCausalLM.from_pretrained(paths.MODEL).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in random_llama().state_dict().items())


def test_the_source_must_not_be_the_target(tiny_model, tmp_path, monkeypatch):
    shutil.copytree(tiny_model, tmp_path / "artifacts" / "model")
    with pytest.raises(ValueError, match="keep it somewhere else"):
        fetched_by_stage({"kind": "local", "path": "artifacts/../artifacts/model"}, tmp_path, monkeypatch)
    assert (paths.MODEL / "model.safetensors").is_file()


def without(*names):
    return lambda d: [(d / name).unlink() for name in names]


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def into_the_hubs_cache(directory: Path) -> None:
    directory.rename(directory.with_name("0123"))
    (directory / "snapshots").mkdir(parents=True)
    directory.with_name("0123").rename(directory / "snapshots" / "0123")


def bos_of_its_own(directory: Path) -> None:
    """A BOS that was added to the tokenizer, and to no embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"bos_token": "<new>"})
    gguf.put_first_and_last(tokenizer, True, False)
    tokenizer.save_pretrained(directory)


def config(**changes):
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, "no directory"),
        (lambda d: (d / "adapter_config.json").write_text("{}"), ValueError, "has an adapter .* merge it into them"),
        (without("config.json"), FileNotFoundError, "no model in Hugging Face layout$"),
        (
            lambda d: (d / "config.json").rename(d / "a.gguf"),
            FileNotFoundError,
            "layout; a GGUF file is taken from a package only",
        ),
        (lambda d: (shutil.rmtree(d), d.touch()), FileNotFoundError, "is a file; name the directory of the model"),
        (into_the_hubs_cache, FileNotFoundError, "of the hub's cache: name .*mine/snapshots/0123"),
        (
            lambda d: (d / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            ValueError,
            r"tokenizer.json is a pointer of Git LFS and not the file: run `git lfs pull` in",
        ),
        (
            lambda d: (d / "model.safetensors").rename(d / "model-00001-of-00001.safetensors"),
            ValueError,
            r"no weights but model-00001-of-00001.safetensors, which nothing names: finercut takes",
        ),
        (bos_of_its_own, ValueError, r"token 400 \('<new>'\) of ordinary text, the model has 400 embeddings: take the"),
        (without("tokenizer.json"), FileNotFoundError, "no tokenizer: one of tokenizer.json"),
        (without("model.safetensors"), ValueError, "has no weights: finercut takes model.safetensors"),
        (pickled, ValueError, r"only pickled weights \(pytorch_model.bin\), which can run code"),
        (
            config(model_type="mine", auto_map={"AutoConfig": "c.C"}),
            ValueError,
            r"\(mine\) needs Python code of its own",
        ),
        (config(model_type="vit"), ValueError, "is a vit model"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "blt"}'),
            ValueError,
            "the config of this blt model gives no num_hidden_layers",
        ),
        (
            config(quantization_config={"quant_method": "gptq"}),
            ValueError,
            r"is quantised \(gptq\): take the model it was made from",
        ),
        (lambda d: (d / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
        (
            lambda d: os.truncate(d / "model.safetensors", 5000),
            ValueError,
            "cut short or damaged|not a safetensors file",
        ),
    ],
)
def test_a_directory_that_is_not_taken_says_why(tiny_model, tmp_path, monkeypatch, damage, error, message):
    mine = copy_of(tiny_model, tmp_path / "mine")
    damage(mine)
    with pytest.raises(error, match=message):
        fetched_by_stage({"kind": "local", "path": mine}, tmp_path, monkeypatch)
    assert not paths.MODEL.exists()
    assert not paths.report("fetch").exists()


def edited(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_the_revision_of_a_local_model_is_that_of_the_files_taken(tiny_model, tmp_path):
    path = shutil.copytree(tiny_model, tmp_path / "mine")
    source = LocalModel(kind="local", path=path)
    (tmp_path / "model").mkdir()
    fetched = fetch_model(source, tmp_path / "model", tmp_path / "work").revision
    (path / "notes.md").write_text("not taken")
    assert revisions.current(source) == fetched
    for name in ("model.safetensors", "tokenizer.json"):
        edited(path / name)
        assert revisions.current(source) != fetched
        edited(path / name)
    assert revisions.current(source) == fetched
    shutil.rmtree(path)
    assert revisions.current(source) is None


def test_one_byte_of_a_local_model_makes_the_stage_stale(tiny_model, tmp_path, monkeypatch):
    path = shutil.copytree(tiny_model, tmp_path / "mine")
    mine = {"kind": "local", "path": path}
    monkeypatch.chdir(tmp_path)
    assert not fetch.is_stale(params(mine))  # no report: DVC runs it anyway
    fetch.run(params(mine))
    assert not fetch.is_stale(params(mine))
    edited(path / "model.safetensors")
    assert fetch.is_stale(params(mine))
    assert not fetch.is_stale(load(ROOT / "params.yaml"))  # a pinned package cannot have changed


def test_the_revision_of_texts_is_that_of_their_files(tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(f"{file.name}\n")
    source = FilesText(kind="files", paths=files)
    read = read_texts(source).revision
    assert revisions.current(source) == read
    edited(files[1])
    assert revisions.current(source) != read
    assert revisions.current(HubModel(kind="hub", repository="a/b", revision="main")) is None
