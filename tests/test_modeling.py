"""A pruned checkpoint against the whole model with the same sublayers masked: transformers' own code, unmodified."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, StaticCache

from finercut.checkpoint.writing import write_pruned
from finercut.model.costs import costs_of, costs_of_config
from finercut.model.devices import dtype_of, room_for
from finercut.model.directory import ModelDirectory
from finercut.model.families import LAYOUT_KEY, PRE_NORM
from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.model.modeling_finercut import removed_sublayers
from finercut.sublayers import parse
from pipelines.inspection import describe

REMOVALS = {
    "first attention": ["0.attention"],
    "last mlp": ["3.mlp"],
    "whole block": ["2.block"],
    "first block and more": ["0.block", "1.mlp", "3.attention"],
    "all attention but the last": ["0.attention", "1.attention", "2.attention"],
}


def sublayers(names):
    return [s for name in names for s in parse(name).sublayers]


@pytest.fixture(scope="module")
def whole(tiny_model):
    return load_whole(tiny_model, torch.float32)


@pytest.fixture(scope="module", params=REMOVALS, ids=lambda name: name.replace(" ", "-"))
def removed(request):
    return sublayers(REMOVALS[request.param])


@pytest.fixture(scope="module")
def pruned_directory(removed, tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pruned")
    write_pruned(tiny_model, removed, directory, {"source": "tiny"}, "# card\n")
    return directory


@pytest.fixture(scope="module")
def pair(whole, removed, pruned_directory):
    """The whole model with the outputs of the removed sublayers zeroed, and the pruned one."""
    pruned = load_pruned(pruned_directory, torch.float32)
    with masked(whole, removed):
        yield whole, pruned


def test_logits_equal_the_masked_models(pair, tokens):
    whole, pruned = pair
    with torch.no_grad():
        assert torch.allclose(whole(tokens).logits, pruned(tokens).logits, atol=1e-5)


def test_masking_is_zeroing_the_last_product(tiny_model, tokens):
    names = sublayers(REMOVALS["first block and more"])
    zeroed, hooked = load_whole(tiny_model, torch.float32), load_whole(tiny_model, torch.float32)
    with torch.no_grad(), masked(hooked, names):
        for s in names:
            block = zeroed.model.layers[s.block]
            (block.self_attn.o_proj if s.kind == "attention" else block.mlp.down_proj).weight.zero_()
        assert torch.allclose(zeroed(tokens).logits, hooked(tokens).logits, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "temperature": 2.0}, {"use_cache": False}, {"cache_implementation": "static"}]
)
def test_generation_equals_the_masked_models(pair, tokens, settings):
    whole, pruned = pair
    settings = {"max_new_tokens": 12, "do_sample": False} | settings
    outputs = []
    for model in (whole, pruned):
        torch.manual_seed(0)
        outputs.append(model.generate(tokens[:3, :7], **settings))
    assert torch.equal(*outputs)


def test_a_left_padded_batch_generates_what_each_prompt_does_alone(pair, tokens):
    whole, pruned = pair
    prompts = tokens[:2, :9].clone()
    prompts[0, :5] = pruned.config.pad_token_id
    mask = (prompts != pruned.config.pad_token_id).long()
    settings = {"max_new_tokens": 8, "do_sample": False}
    batched = pruned.generate(prompts, attention_mask=mask, **settings)
    assert torch.equal(batched, whole.generate(prompts, attention_mask=mask, **settings))
    assert torch.equal(batched[0, 5:], pruned.generate(prompts[:1, 5:], **settings)[0])


def test_the_cache_holds_kept_attentions_only(pair, tokens):
    _, pruned = pair
    n_kept = 4 - sum(kind == "attention" for _, kind in removed_sublayers(pruned.config))
    with torch.no_grad():
        cache = pruned(tokens, use_cache=True).past_key_values
    assert cache.get_seq_length() == tokens.shape[1]
    assert len([layer for layer in cache.layers if layer.get_seq_length()]) == n_kept
    assert len(StaticCache(config=pruned.config, max_cache_len=32).layers) == n_kept


def test_removed_weights_are_gone_and_kept_ones_keep_their_names(pruned_directory, tiny_model, removed):
    left, before = load_file(pruned_directory / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    gone = before.keys() - left.keys()
    members = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
    prefixes = tuple(f"model.layers.{s.block}.{m}." for s in removed for m in members[s.kind])
    assert gone == {name for name in before if name.startswith(prefixes)}
    assert all(torch.equal(before[name], tensor) for name, tensor in left.items())


def test_config_follows_the_schema_of_transformers(pruned_directory, removed):
    raw = json.loads((pruned_directory / "config.json").read_text())
    assert raw["architectures"] == ["FinerCutLlamaForCausalLM"]
    assert raw["model_type"] == "finercut_llama"
    assert raw["num_hidden_layers"] == 4
    skipped = {f"{block}.{kind}" for block, at in raw["per_layer_config"].items() for kind in at["skip"]}
    assert skipped == {str(s) for s in removed}
    assert raw["finercut"]["source"] == "tiny"


def test_costs_are_those_of_the_files(pruned_directory, tiny_model, removed):
    costs = costs_of(ModelDirectory(tiny_model))
    before, left = (
        sum(t.numel() for t in load_file(d / "model.safetensors").values()) for d in (tiny_model, pruned_directory)
    )
    assert costs["parameters"].whole == before
    assert costs["parameters"].of(removed) == before - left
    # keys and values of 2 heads of 32 in float32
    assert set(costs["kv_cache"].by_sublayer.values()) == {2 * 2 * 32 * 4, 0}
    assert costs.shares(removed)["sublayers"] == len(removed) / 8
    assert costs.shares(removed)["parameters"] == (before - left) / before


def test_latent_attention_caches_one_vector_and_one_rotary_key():
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        first_k_dense_replace=2,
        q_lora_rank=16,
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        dtype="float32",
    )
    setattr(config, LAYOUT_KEY, PRE_NORM.to_dict())
    assert set(costs_of_config(config)["kv_cache"].by_sublayer.values()) == {(12 + 4) * 4, 0}


def test_describe_tells_what_is_gone(pruned_directory, removed):
    text = describe(str(pruned_directory))
    assert f"{len(removed)} of 8 sublayers removed" in text
    assert "source: tiny" in text


def test_describe_knows_a_whole_model(tiny_model):
    assert describe(str(tiny_model)) == "whole llama model, 4 blocks, nothing removed"


def test_saving_and_loading_again_changes_nothing(pair, pruned_directory, tokens, tmp_path):
    _, pruned = pair
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, pruned(tokens).logits)
    ours, theirs = (json.loads((d / "config.json").read_text()) for d in (pruned_directory, tmp_path))
    assert ours == theirs
    assert (tmp_path / "modeling_finercut.py").read_text() == (pruned_directory / "modeling_finercut.py").read_text()


def test_gradients_reach_every_weight_that_is_left(pair, tokens):
    _, pruned = pair
    pruned.zero_grad()
    pruned(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters())


@pytest.fixture
def some_pruned(tiny_model, tmp_path):
    (tmp_path / "p").mkdir()
    write_pruned(tiny_model, sublayers(["1.attention", "2.block"]), tmp_path / "p", {}, "")
    return tmp_path / "p"


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_the_config_are_refused(some_pruned, tiny_model, fault):
    weights = load_file(some_pruned / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        name = "model.layers.2.mlp.down_proj.weight"
        weights[name] = load_file(tiny_model / "model.safetensors")[name]
    else:
        weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, some_pruned / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=fault if fault != "mismatched" else "mismatch"):
        load_pruned(some_pruned)


def test_removing_every_attention_or_nothing_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="every attention is removed"):
        write_pruned(tiny_model, sublayers([f"{i}.attention" for i in range(4)]), tmp_path, {}, "")
    with pytest.raises(ValueError, match="nothing to remove"):
        write_pruned(tiny_model, [], tmp_path, {}, "")


def test_a_whole_model_is_not_taken_for_a_pruned_one(tiny_model, some_pruned):
    with pytest.raises(ValueError, match="holds a llama model"):
        load_pruned(tiny_model)
    with pytest.raises(ValueError, match="cannot prune a finercut_llama model"):
        load_whole(some_pruned)


@pytest.mark.parametrize(("able", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or able)
    assert dtype_of("auto", torch.device("cuda:0")) == dtype


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"bf16": True}, "bfloat16"),
        ({"avx2": True, "avx512_bf16": False}, "float32"),
    ],
)
def test_a_cpu_computes_in_float32_unless_it_multiplies_in_bfloat16(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert dtype_of("auto", torch.device("cpu")) == getattr(torch, dtype)
    assert dtype_of("auto", torch.device("meta")) == torch.bfloat16
    assert dtype_of("float16", torch.device("cpu")) == torch.float16


def test_weights_go_to_the_first_gpu_that_holds_them_or_to_all_together():
    # a tenth of what is free is kept
    assert room_for(90, {0: 100, 1: 100}) == {0: 90}
    assert room_for(91, {0: 100, 1: 200}) == {1: 180}
    assert room_for(91, {0: 100, 1: 100}) == {0: 90, 1: 90}
    assert room_for(180, {2: 200}) == {2: 180}
    with pytest.raises(ValueError, match=r"weights are 130 GiB, .* room for 72 \+ 36 GiB .*: set weights_gib"):
        room_for(130 * 2**30, {0: 80 * 2**30, 1: 40 * 2**30})


def test_a_model_whose_blocks_do_not_fit_the_devices_it_is_spread_over_is_refused(tiny_model, whole):
    n_bytes = sum(p.nbytes for p in whole.parameters())
    assert torch.equal(load_whole(tiny_model, room={"cpu": 4 * n_bytes}).lm_head.weight, whole.lm_head.weight)
    with pytest.raises(ValueError, match="set weights_gib"):
        load_whole(tiny_model, room={"cpu": n_bytes})


# Runs where finercut cannot be imported.
WITHOUT_FINERCUT = """
import sys
sys.modules["finercut"] = None
import torch
from transformers import AutoModelForCausalLM
directory, tokens = sys.argv[1], torch.load(sys.argv[2])
try:
    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
except ValueError as error:
    print("refused:", error)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(tokens).logits, sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


@pytest.mark.slow  # imports torch anew
def test_without_finercut_it_loads_by_its_own_file_or_is_refused(some_pruned, tokens, tmp_path):
    torch.save(tokens, tmp_path / "tokens.pt")
    arguments = [some_pruned, tmp_path / "tokens.pt", tmp_path / "logits.pt", tmp_path / "again"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FINERCUT, *map(str, arguments)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "refused: " in done.stdout
    assert "trust_remote_code=True" in done.stdout
    for directory in (some_pruned, tmp_path / "again"):
        model = load_pruned(directory)
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tokens).logits)


def test_importing_finercut_imports_neither_torch_nor_transformers():
    code = "import finercut, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.slow  # imports torch anew
@pytest.mark.parametrize("first", ["from transformers import LlamaForCausalLM", "from vllm import LLM"])
def test_the_auto_classes_know_pruned_models_where_finercut_is_not_imported_first_as_here(some_pruned, first):
    code = (
        f"{first}\nimport finercut\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
        f"print(AutoConfig.from_pretrained({str(some_pruned)!r}).model_type)\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(some_pruned)!r})).__module__)"
    )
    lines = subprocess.check_output([sys.executable, "-c", code], text=True, stdin=subprocess.DEVNULL).split()
    assert lines == ["finercut_llama", "finercut.model.modeling_finercut"]
