"""Damaged models, whole, pruned or in GGUF: one line, a status that is not 0, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import example_reports
import pytest
import torch
from bad_input import complaint, mutated, names, refused
from click.testing import CliRunner
from conftest import random_llama
from gguf_files import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from finercut.model.directory import ModelDirectory
from finercut.model.tensors import safetensors_shapes
from finercut.sources import gguf
from pipelines import paths
from pipelines.cli import main


def config(**changes: object) -> Callable[[Path], None]:
    """Changes of a model's config.json; `...` takes a key out."""

    def damage(directory: Path) -> None:
        file = directory / "config.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    return damage


def content(name: str, written: bytes | str) -> Callable[[Path], None]:
    return lambda d: (d / name).write_bytes(written if isinstance(written, bytes) else written.encode())


def header(change: Callable[[dict], object], data: bytes | None = None) -> Callable[[Path], None]:
    """The header of model.safetensors changed as JSON, its tensors left as they are, or replaced."""

    def damage(directory: Path) -> None:
        file = directory / "model.safetensors"
        whole = file.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8 : 8 + length])
        changed = change(entries)
        text = json.dumps(entries if changed is None else changed).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + (whole[8 + length :] if data is None else data))

    return damage


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors", {"format": "pt"})

    return damage


def index(weight_map: object) -> Callable[[Path], None]:
    """Weights in a shard of their own, named by an index."""

    def damage(directory: Path) -> None:
        shard = "model-00001-of-00001.safetensors"
        (directory / "model.safetensors").rename(directory / shard)
        named = dict.fromkeys(load_file(directory / shard), shard)
        value = weight_map(named) if callable(weight_map) else weight_map
        (directory / "model.safetensors.index.json").write_text(json.dumps(value))

    return damage


def nothing(_: Path) -> None:
    pass


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config not JSON": (content("config.json", "{"), "config.json"),
    "config empty": (content("config.json", ""), "config.json"),
    "config binary": (content("config.json", bytes(range(256))), "config.json"),
    "config a list": (content("config.json", "[]"), "config.json"),
    "config a number": (content("config.json", "4"), "config.json"),
    "config deep": (content("config.json", "[" * 100_000), "config.json"),
    "no model_type": (config(model_type=...), "model_type"),
    "model_type null": (config(model_type=None), "model_type"),
    "model_type a list": (config(model_type=["llama"]), "model_type"),
    "model_type unknown": (config(model_type="camel"), "is a camel model"),
    "blocks a word": (config(num_hidden_layers="four"), "num_hidden_layers"),
    "blocks null": (config(num_hidden_layers=None), "num_hidden_layers"),
    "blocks negative": (config(num_hidden_layers=-4), "num_hidden_layers"),
    "blocks zero": (config(num_hidden_layers=0), "num_hidden_layers"),
    "more blocks than weights": (config(num_hidden_layers=5), "layers.4.input_layernorm.weight is missing (9 so)"),
    "a billion blocks": (config(num_hidden_layers=10**9), "do not fit"),
    "fewer blocks than weights": (
        config(num_hidden_layers=3),
        "weight is not in the model (9 so)",
    ),
    "heads zero": (config(num_attention_heads=0), "config"),
    "heads that do not divide": (config(num_attention_heads=3, head_dim=None), "config"),
    "other width": (config(hidden_size=64), "is of another shape"),
    "width a word": (config(hidden_size="wide"), "hidden_size"),
    "other vocabulary": (config(vocab_size=500), "do not fit"),
    "vocabulary negative": (config(vocab_size=-1), "vocab_size"),
    "context null": (config(max_position_embeddings=None), "max_position_embeddings"),
    "context zero": (config(max_position_embeddings=0), "max_position_embeddings"),
    "no such activation": (config(hidden_act="magic"), "magic"),
    "no such dtype": (config(dtype="float31"), "config"),
    "no such rope": (config(rope_parameters={"rope_type": "knot"}), "config"),
    "rope a list": (config(rope_parameters=[1]), "config"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "is quantised"),
    "pruned already": (config(model_type="finercut_llama"), "take the whole one"),
    "other family": (config(model_type="gpt2"), "is missing (53 so)"),
    "weights empty": (content("model.safetensors", ""), "model.safetensors is not a safetensors file"),
    "weights text": (content("model.safetensors", "version https://git-lfs.github.com/spec/v1\n" * 9), "safetensors"),
    "weights a zip": (content("model.safetensors", b"PK\3\4" + bytes(200)), "is not a safetensors file"),
    "weights cut": (lambda d: os.truncate(d / "model.safetensors", 100_000), "cut short or damaged"),
    "weights longer": (lambda d: (d / "model.safetensors").open("ab").write(b"x"), "cut short or damaged"),
    "header a list": (header(lambda h: []), "is not a safetensors file"),
    "header's entry a number": (header(lambda h: h.update({Q_PROJ: 3})), "is not a safetensors file"),
    "no offsets": (header(lambda h: h[Q_PROJ].pop("data_offsets")), "is not a safetensors file"),
    "no shape": (header(lambda h: h[Q_PROJ].pop("shape")), "is not a safetensors file"),
    "one offset": (header(lambda h: h[Q_PROJ].update(data_offsets=[0])), "is not a safetensors file"),
    "offsets words": (header(lambda h: h[Q_PROJ].update(data_offsets=["a", "b"])), "is not a safetensors file"),
    "offsets backwards": (header(lambda h: h[Q_PROJ]["data_offsets"].reverse()), "is not a safetensors file"),
    "offsets overlap": (header(lambda h: h[Q_PROJ].update(data_offsets=[0, 65536])), "is not a safetensors file"),
    "offsets negative": (header(lambda h: h[Q_PROJ].update(data_offsets=[-65536, 0])), "is not a safetensors file"),
    "shape not of the size": (header(lambda h: h[Q_PROJ].update(shape=[128, 127])), "is not a safetensors file"),
    "shape negative": (header(lambda h: h[Q_PROJ].update(shape=[-128, -128])), "is not a safetensors file"),
    "dtype unknown": (header(lambda h: h[Q_PROJ].update(dtype="F31")), "is not a safetensors file"),
    "dtype a number": (header(lambda h: h[Q_PROJ].update(dtype=32)), "is not a safetensors file"),
    "no tensors": (header(lambda h: {}, b""), "do not fit the config"),
    "tensor gone": (tensors(lambda t: t.pop(Q_PROJ)), Q_PROJ),
    "tensor too many": (tensors(lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(3)})), "layers.9"),
    "names of a wrapper": (
        tensors(lambda t: [t.update({f"module.{name}": t.pop(name)}) for name in list(t)]),
        "their names begin with 'module.', which is not the model's: take that away",
    ),
    "tensor misshapen": (tensors(lambda t: t.update({Q_PROJ: torch.ones(128, 64)})), Q_PROJ),
    "tensor of integers": (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].long()})), f"{Q_PROJ} is not floating-point"),
    "tensor of NaN": (tensors(lambda t: t[Q_PROJ].fill_(float("nan"))), Q_PROJ),
    "one infinity": (tensors(lambda t: t[Q_PROJ].view(-1)[77].fill_(float("inf"))), Q_PROJ),
    "index not JSON": (lambda d: (index({})(d), content("model.safetensors.index.json", "{")(d)), "index.json"),
    "index a list": (index([]), "index.json"),
    "index without a map": (index({"metadata": {}}), "index.json"),
    "index's map a list": (index({"weight_map": ["a"]}), "index.json"),
    "index names no shard": (
        index(lambda m: {"weight_map": m | {Q_PROJ: "model-00002-of-00002.safetensors"}}),
        "shard",
    ),
    "index leaves the folder": (index(lambda m: {"weight_map": m | {Q_PROJ: "../../secret.safetensors"}}), "shard"),
    "tokenizer not JSON": (content("tokenizer.json", "{"), "tokenizer"),
    "tokenizer empty": (content("tokenizer.json", ""), "tokenizer"),
    "tokenizer of nothing": (content("tokenizer.json", "{}"), "tokenizer"),
    "tokenizer a list": (content("tokenizer.json", "[]"), "tokenizer"),
    "tokenizer unknown": (content("tokenizer.json", '{"model": {"type": "BPE2"}}'), "tokenizer"),
    "tokenizer of another": (
        lambda d: random_llama(vocab_size=2000).save_pretrained(d),
        "has 400 entries, the model 2000 embeddings",
    ),
    "tokenizer of its own code": (
        content(
            "tokenizer_config.json", '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", null]}}'
        ),
        "load it where you trust that code, and save it as tokenizer.json",
    ),
    "tokenizer config not JSON": (content("tokenizer_config.json", "{"), "tokenizer"),
    "tokenizer config a list": (content("tokenizer_config.json", "[]"), "tokenizer"),
    "generation config not JSON": (content("generation_config.json", "{"), "generation_config.json"),
    "only a pickle": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "can run code when loaded"),
    "only a checkpoint of torch": (lambda d: (d / "model.safetensors").rename(d / "model.pt"), "can run code"),
    "a folder for weights": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()),
        "no weights",
    ),
    "nothing": (shutil.rmtree, "no directory"),
}


@pytest.mark.parametrize(("damage", "message"), MODELS.values(), ids=MODELS)
def test_a_model_that_is_not_taken(workspace, damage, message):
    damage(Path("mine"))
    assert message in refused("fetch")


def test_a_model_in_good_order_is_taken(workspace, without_vllm):
    assert CliRunner().invoke(main, ["fetch"]).exit_code == 0


def test_weights_beside_the_language_model_are_let_be(workspace, without_vllm, caplog):
    tensors(lambda t: t.update({"vision.layers.0.weight": torch.ones(3)}))(Path("mine"))
    assert CliRunner().invoke(main, ["fetch"]).exit_code == 0
    assert "1 tensors are not used, the first is vision.layers.0.weight" in caplog.text


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_weights_is_found_in_their_header_or_changes_only_numbers(compressed, tmp_path, data):
    whole = (compressed / "mine" / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    file = tmp_path / "model.safetensors"
    file.write_bytes(data.draw(mutated(whole[:length])) + whole[length:])
    assert names(tmp_path, complaint(safetensors_shapes, tmp_path))


@pytest.mark.parametrize(
    ("stage", "damage"),
    [(stage, damage) for stage in ("search", "prune", "evaluate_whole") for damage in ("weights cut", "header a list")]
    + [(stage, "config a list") for stage in ("calibrate", "search", "prune", "evaluate_whole")]
    + [(stage, "tensor gone") for stage in ("search", "evaluate_whole")]
    + [("calibrate", damage) for damage in ("tokenizer empty", "tokenizer of nothing", "tokenizer config a list")],
)
def test_a_model_that_was_damaged_after_it_was_fetched(workspace, stage, damage):
    MODELS[damage][0](paths.MODEL)
    assert "artifacts/model" in refused(stage)


PRUNED: dict[str, tuple[Callable[[Path], object], str]] = {
    "config not JSON": (content("config.json", "{"), "config.json is not JSON"),
    "no config": (lambda d: (d / "config.json").unlink(), "no model in artifacts/pruned"),
    "not pruned": (config(model_type="llama"), "holds a llama model"),
    "nothing skipped": (config(per_layer_config=...), "weights and config.json do not belong together"),
    "skips a word": (config(per_layer_config="12"), "config"),
    "skips what it has": (
        config(per_layer_config={"0": {"skip": ["attention", "mlp"]}, "1": {"skip": ["attention", "mlp"]}}),
        "do not belong together",
    ),
    "skips every attention": (
        config(per_layer_config={str(i): {"skip": ["attention"]} for i in range(4)}),
        "every attention is removed",
    ),
    "no layout": (config(finercut=None), "finercut.layout"),
    "a layout that is none": (config(finercut={"layout": {"blocks": "nowhere"}}), "artifacts/pruned"),
    "weights cut": (lambda d: os.truncate(d / "model.safetensors", 100_000), "cut short or damaged"),
    "weights empty": (content("model.safetensors", ""), "is not a safetensors file"),
    "other weights": (lambda d: shutil.copy("mine/model.safetensors", d), "do not belong together"),
    "weights of NaN": (
        tensors(lambda t: [tensor.fill_(float("nan")) for tensor in t.values()]),
        "are not finite: the checkpoint is damaged",
    ),
}


@pytest.mark.parametrize(("damage", "message"), PRUNED.values(), ids=PRUNED)
def test_a_checkpoint_that_is_not_proved(workspace, damage, message):
    whole = ModelDirectory(paths.MODEL).weights_sha256
    example_reports.prove_whole().model_copy(update={"sha256": whole}).write(paths.report("prove_whole"))
    damage(paths.PRUNED)
    assert message in refused("prove")
    assert not paths.report("prove").exists()


@pytest.mark.parametrize("damage", ["config not JSON", "no config", "skips a word"])
def test_a_checkpoint_that_cannot_be_inspected(workspace, damage):
    PRUNED[damage][0](paths.PRUNED)
    assert "artifacts/pruned" in refused("inspect", str(paths.PRUNED))


@pytest.mark.parametrize(
    "changes", [{"finercut": ...}, {"per_layer_config": ...}, {"per_layer_config": {"0": {"skip": ["mlp"]}}}]
)
def test_a_checkpoint_whose_config_contradicts_itself_is_not_described(workspace, changes):
    config(**changes)(paths.PRUNED)
    said = refused("inspect", str(paths.PRUNED))
    assert "config.json contradicts itself, and nothing loads it as it is: its blocks skip" in said


GGUFS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"version https://git-lfs.github.com/spec/v1\n",
    "cut in its header": lambda whole: whole[:60],
    "cut in its tensors": lambda whole: whole[:-1000],
    "version of the future": lambda whole: whole[:4] + struct.pack("<I", 99) + whole[8:],
    "more tensors than there are": lambda whole: whole[:8] + struct.pack("<Q", 2**60) + whole[16:],
    "more fields than there are": lambda whole: whole[:16] + struct.pack("<Q", 2**60) + whole[24:],
    "a key without end": lambda whole: whole[:24] + struct.pack("<Q", 2**60) + whole[32:],
    "other architecture": lambda whole: whole.replace(b"llama", b"camel"),
    "no tokenizer": lambda whole: whole.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.nothin"),
}


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory, tokenizer) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, random_llama(), tokenizer)
    return file.read_bytes()


@pytest.mark.parametrize("damage", GGUFS.values(), ids=GGUFS)
def test_a_gguf_file_that_cannot_be_read(good_gguf, tmp_path, damage):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(damage(good_gguf))
    (tmp_path / "model").mkdir()
    said = complaint(lambda path: gguf.dequantise(path, "float32", tmp_path / "model"), file)
    assert "tiny.gguf" in said
    assert "is good" not in said
    assert len(said.splitlines()) == 1
