"""Quantised checkpoints, made here number by number, as `fetch` dequantises them."""

import json

import pytest
import torch
from family_models import OTHERS, UNDECLARED, random_model
from safetensors.torch import load_file, save_file

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
}


def is_quantised(name, tensor, settings):
    if settings["quant_method"] == "mxfp4":
        return tensor.dim() == 3
    return tensor.dim() == 2 and "proj" in name and name.startswith("model.layers.")


@pytest.fixture
def make(tmp_path, tokenizer):
    """Writes a quantised model of a kind; returns its directory and its weights, dequantised by hand."""

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
        save_file({n: t.contiguous() for n, t in stored.items()}, directory / "model.safetensors", {"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        return directory, weights

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_they_stand_for(kind, make, tmp_path):
    directory, expected = make(kind)
    before = (directory / "model.safetensors").read_bytes()
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    fetch_model(LocalModel(kind="local", path=directory, dequantise=True), fetched, tmp_path / "work")
    found = load_file(fetched / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert {tensor.dtype for name, tensor in found.items() if "proj" in name} == {torch.bfloat16}
    config = json.loads((fetched / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert not [file.name for file in fetched.iterdir() if file.is_dir()]
    assert (directory / "model.safetensors").read_bytes() == before


def test_they_are_refused_unless_the_source_says_so(make, tmp_path):
    directory, _ = make("fp8")
    with pytest.raises(ValueError, match=r"quantised \(fp8\).*write dequantise: true into fetch\.source"):
        fetch_model(LocalModel(kind="local", path=directory), tmp_path, tmp_path / "work")
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_without_their_scales_are_refused(make, tmp_path):
    directory, _ = make("fp8")
    stored = load_file(directory / "model.safetensors")
    (tmp_path / "fetched").mkdir()
    save_file({n: t for n, t in stored.items() if "_scale" not in n}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="proj.weight has no scale"):
        fetch_model(LocalModel(kind="local", path=directory, dequantise=True), tmp_path / "fetched", tmp_path / "work")
