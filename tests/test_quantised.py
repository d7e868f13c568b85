"""Quantised checkpoints, made here number by number, as `fetch` dequantises them."""

import json
import shutil

import pytest
import torch
from family_models import OTHERS, UNDECLARED, random_model
from safetensors.torch import load_file, save_file

from finercut.model.checks import check_model
from finercut.model.directory import ModelDirectory
from finercut.model.quantised import _say_at_the_top
from finercut.model.tensors import safetensors_files
from finercut.sources.models import fetch_model
from finercut.sources.settings import LocalModel

BLOCK = 48
"""Numbers with one scale, in each direction; some weights have rows or columns that fill no block."""
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def in_blocks(scale, shape):
    """A scale a block, spread over the numbers of each."""
    spread = scale.repeat_interleave(BLOCK, -1)[..., : shape[-1]]
    return spread.repeat_interleave(BLOCK, -2)[..., : shape[-2], :]


def fp8_blocks(name, weight):
    scale = torch.rand(-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK)) + 0.5
    stored = (weight / in_blocks(scale, weight.shape)).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scale}, stored.float() * in_blocks(scale, weight.shape)


def mxfp4(name, weight):
    # transformers holds experts as (experts, inputs, outputs); a block of 32 inputs has one power of two.
    shape = (weight.shape[0], weight.shape[2], weight.shape[1])
    codes, exponents = torch.randint(0, 16, shape), torch.randint(120, 128, (*shape[:2], shape[2] // 32))
    values = FP4[codes % 8] * torch.where(codes < 8, 1, -1) * (2.0 ** (exponents - 127)).repeat_interleave(32, -1)
    packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).reshape(*exponents.shape, 16)
    stored = {f"{name}_blocks": packed.to(torch.uint8), f"{name}_scales": exponents.to(torch.uint8)}
    return stored, values.transpose(1, 2)


def int8_channels(name, weight):
    scale = (torch.rand(len(weight), 1) / 100 + 0.005).to(torch.bfloat16)
    stored = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    return {name: stored, f"{name}_scale": scale}, stored.float() * scale.float()


def fp8_channels(name, weight):
    scale = (torch.rand(len(weight), 1) / 100 + 0.005).to(torch.bfloat16)
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale": scale}, stored.float() * scale.float()


def int4_groups(name, weight):
    rows, columns = weight.shape
    numbers, scale = torch.randint(-8, 8, (rows, columns)), torch.rand(rows, columns // 32).to(torch.bfloat16)
    packed = sum((numbers[:, i::8] + 8) << (4 * i) for i in range(8))
    packed = torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32)
    stored = {f"{name}_packed": packed, f"{name}_scale": scale, f"{name}_shape": torch.tensor([rows, columns])}
    return stored, numbers * scale.float().repeat_interleave(32, -1)


def in_words(fields, n_bits, minus_one=False):
    """(rows, integers) as words of 32 bits, the first in the lowest bits; each less one, where it says so."""
    rows = []
    for row in fields.tolist():
        words = [row[i : i + 32 // n_bits] for i in range(0, len(row), 32 // n_bits)]
        packed = [sum((field - minus_one) << (n_bits * i) for i, field in enumerate(word)) % 2**32 for word in words]
        rows.append([word - 2**32 if word >= 2**31 else word for word in packed])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(n_bits, minus_one, orders=True):
    def stored(name, weight):
        outputs, inputs = weight.shape
        groups = torch.arange(inputs) // 32
        groups = groups[torch.randperm(inputs)] if orders else groups
        numbers = torch.randint(2**n_bits, (inputs, outputs))
        zeros = torch.randint(2**n_bits, (inputs // 32, outputs))
        scale = (torch.rand(zeros.shape) / 100 + 0.005).half()
        parts = {
            "qweight": in_words(numbers.T, n_bits).T,
            "qzeros": in_words(zeros, n_bits, minus_one),
            "scales": scale,
            "bias": torch.zeros(outputs).half(),
        } | ({"g_idx": groups.int()} if orders else {})
        values = torch.stack([(numbers[i] - zeros[g]) * scale[g].float() for i, g in enumerate(groups.tolist())])
        return {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}, values.T

    return stored


def awq(name, weight):
    outputs, inputs = weight.shape
    numbers, zeros = torch.randint(16, (inputs, outputs)), torch.randint(16, (inputs // 32, outputs))
    scale = (torch.rand(zeros.shape) / 100 + 0.005).half()

    def mixed(fields):
        return in_words(fields.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    parts = {"qweight": mixed(numbers), "qzeros": mixed(zeros), "scales": scale}
    values = torch.stack([(numbers[i] - zeros[i // 32]) * scale[i // 32].float() for i in range(inputs)])
    return {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}, values.T


def nf4(name, weight):
    n, table, tables = weight.numel(), torch.rand(16) - 0.5, torch.rand(256)
    codes, largest = torch.randint(16, (n,)), torch.randint(256, (-(-n // 64),), dtype=torch.uint8)
    spread = torch.rand(-(-len(largest) // 256))
    sizes = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(weight.shape)}
    sizes |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0625}
    parts = {
        "": (16 * codes[0::2] + codes[1::2]).to(torch.uint8)[:, None],
        ".absmax": largest,
        ".quant_map": table,
        ".nested_absmax": spread,
        ".nested_quant_map": tables,
        ".quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(sizes).encode()), dtype=torch.uint8),
    }
    numbers = torch.arange(n)
    scale = tables[largest[numbers // 64].int()] * spread[numbers // 64 // 256] + 0.0625
    return {name + part: tensor for part, tensor in parts.items()}, (table[codes] * scale).reshape(weight.shape)


def int8_rows(name, weight):
    largest = weight.abs().amax(1)
    stored = (weight / largest[:, None] * 127).round().to(torch.int8)
    parts = {"weight": stored, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    parts = {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    return parts, stored.float() * largest[:, None] / 127


def mxfp8(name, weight):
    exponents = torch.randint(118, 122, (weight.shape[0], weight.shape[1] // 32), dtype=torch.uint8)
    scale = (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": exponents}, stored.float() * scale


def in_turn(store):
    """As a model holds matrices whose weights are (inputs, outputs)."""

    def stored(name, weight):
        parts, values = store(name, weight.T)
        return {name: tensor for name, tensor in parts.items() if not name.endswith("bias")}, values.T

    return stored


def compressed(layout, weights, inputs=None):
    group = {"targets": ["Linear"], "weights": _WEIGHTS | weights, "input_activations": inputs and _INPUTS | inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["lm_head"]}
# By name: model type and changes, how a weight is stored, what config.json says of it.
KINDS = {
    "fp8": ("llama", {}, fp8_blocks, FP8),
    "fp8 experts": (*OTHERS["deepseek_v3"], fp8_blocks, FP8),
    "mxfp4": (*UNDECLARED["gpt_oss"], mxfp4, {"quant_method": "mxfp4"}),
    "int8": ("llama", {}, int8_channels, compressed("int-quantized", {}, {"type": "int"})),
    "fp8 channels": ("llama", {}, fp8_channels, compressed("float-quantized", {"type": "float"}, {"type": "float"})),
    "int4": (
        "llama",
        {},
        int4_groups,
        compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    ),
    "mxfp8": ("llama", {}, mxfp8, {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    "gptq": ("llama", {}, gptq(4, True), {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}),
    "gptq v2": (
        "llama",
        {},
        gptq(8, False, orders=False),
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "gptq of (inputs, outputs)": ("gpt2", {}, in_turn(gptq(2, True)), {"quant_method": "gptq", "bits": 2}),
    "awq": ("llama", {}, awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"}),
    "bitsandbytes nf4": ("llama", {}, nf4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bitsandbytes int8": ("llama", {}, int8_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


def is_quantised(name, tensor, settings):
    if settings.get("quant_method") == "mxfp4":
        return tensor.dim() == 3
    return tensor.dim() == 2 and name.startswith(("model.layers.", "transformer.h."))


@pytest.fixture
def make(tmp_path, tokenizer):
    """Writes a quantised model of a kind, in two files; returns its directory and its weights, dequantised by hand."""

    def made(kind):
        model_type, changes, store, settings = KINDS[kind]
        torch.manual_seed(0)
        directory = tmp_path / "quantised"
        random_model(model_type, **changes).to(torch.bfloat16).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        weights = load_file(directory / "model.safetensors")
        stored = {}
        for name, tensor in weights.items():
            new = {name: tensor}
            if is_quantised(name, tensor, settings):
                new, weights[name] = store(name, tensor.float())
            stored |= new
        assert len(stored) > len(weights)
        (directory / "model.safetensors").unlink()
        # A matrix whose scale is in the other file is among them.
        for number, names in enumerate((list(stored)[::2], list(stored)[1::2])):
            part = {name: stored[name].contiguous() for name in names}
            save_file(part, directory / f"model-{number}.safetensors", {"format": "pt"})
        weight_map = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(stored)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        return directory, weights

    return made


def weights_in(directory):
    return {name: tensor for file in safetensors_files(directory) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_they_stand_for(kind, make, tmp_path):
    directory, expected = make(kind)
    before = [file.read_bytes() for file in safetensors_files(directory)]
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    fetch_model(LocalModel(kind="local", path=directory, dequantise=True), fetched, tmp_path / "work")
    found = weights_in(fetched)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert {tensor.dtype for name, tensor in found.items() if "proj" in name} == {torch.bfloat16}
    config = json.loads((fetched / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert not [file.name for file in fetched.iterdir() if file.is_dir()]
    assert [file.read_bytes() for file in safetensors_files(directory)] == before
    check_model(ModelDirectory(fetched))


def test_they_are_refused_unless_the_source_says_so(make, tmp_path):
    directory, _ = make("fp8")
    with pytest.raises(ValueError, match=r"quantised \(fp8\).*write dequantise: true into fetch\.source"):
        fetch_model(LocalModel(kind="local", path=directory), tmp_path, tmp_path / "work")
    assert not list(tmp_path.glob("*.safetensors"))


def test_weights_without_their_scales_are_refused(make, tmp_path):
    directory, _ = make("fp8")
    (tmp_path / "fetched").mkdir()
    for file in safetensors_files(directory):
        save_file({n: t for n, t in load_file(file).items() if "_scale" not in n}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="proj.weight has no scale"):
        fetch_model(LocalModel(kind="local", path=directory, dequantise=True), tmp_path / "fetched", tmp_path / "work")


def test_a_packed_matrix_whose_parts_are_not_all_there_is_refused(make, tmp_path):
    directory, _ = make("awq")
    (tmp_path / "fetched").mkdir()
    for file in safetensors_files(directory):
        save_file({n: t for n, t in load_file(file).items() if "scales" not in n}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the quantised weights in .*proj.scales is missing"):
        fetch_model(LocalModel(kind="local", path=directory, dequantise=True), tmp_path / "fetched", tmp_path / "work")


FOREIGN = ["aqlm", "auto-round", "bitnet", "eetq", "exl3", "fbgemm_fp8", "higgs", "hqq", "metal", "modelopt", "nvfp4"]
FOREIGN += ["quanto", "quark", "spqr", "torchao", "vptq"]
# What a config.json says of how it is quantised, and the end of the line that refuses it.
REFUSED = {
    **{name: ({"quant_method": name}, rf"\({name}\): .*; fetch dequantises awq, .*mxfp8$") for name in FOREIGN},
    "mlx": ({"bits": 4, "group_size": 64}, r"\(by a method that its config does not name\): .*; fetch dequantises"),
    "3 bits": ({"quant_method": "gptq", "bits": 3}, "of gptq, integers of 2 or 4 or 8 bits are known, not 3$"),
    "marlin": ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq or gptq_v2 is known, not marlin$"),
    "gemv": ({"quant_method": "awq", "version": "gemv"}, "of awq, the format gemm is known, not gemv$"),
    "llm-awq": ({"quant_method": "awq", "backend": "llm-awq"}, "the format gemm is known, not llm-awq$"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_dequantised_is_refused_before_a_file_is_copied(kind, tiny_model, tmp_path):
    settings, line = REFUSED[kind]
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (tmp_path / "fetched").mkdir()
    with pytest.raises(ValueError, match=rf"^{directory}: cannot prune a llama model that is quantised .*{line}"):
        fetch_model(LocalModel(kind="local", path=directory, dequantise=True), tmp_path / "fetched", tmp_path / "work")
    assert list((tmp_path / "fetched").iterdir()) == []


def test_what_the_language_models_part_of_a_config_says_counts(make, tmp_path):
    directory, _ = make("fp8")
    config = json.loads((directory / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    outer = {"model_type": "llava", "text_config": config | {"quantization_config": quantisation}}
    (directory / "config.json").write_text(json.dumps(outer))
    with pytest.raises(ValueError, match=r"llava model that is quantised \(fp8\).*write dequantise: true"):
        fetch_model(LocalModel(kind="local", path=directory), tmp_path, tmp_path / "work")
    _say_at_the_top(ModelDirectory(directory))
    written = json.loads((directory / "config.json").read_text())
    assert written["quantization_config"] == quantisation
    assert "quantization_config" not in written["text_config"]
