"""Models whose blocks differ, mix tokens in several ways or share keys and values, against the masked whole model."""

import json

import pytest
import torch
from family_models import HYBRIDS, OTHERS, SHARED, each, random_model, run_without_finercut

from finercut.checkpoint.prune import prune
from finercut.checkpoint.writing import write_pruned
from finercut.model.caches import forward
from finercut.model.costs import costs_of, costs_of_config
from finercut.model.directory import ModelDirectory
from finercut.model.families import LAYOUT_KEY, Branch, fixed_sublayers, is_declared, layout_of
from finercut.model.layouts import note_layout
from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.model.probe import find_layout
from finercut.selection.greedy import search
from finercut.selection.selection import allowance
from finercut.selection.settings import Budget
from finercut.sublayers import Sublayer

TOLERANCE = 2e-5  # of logits whose spread is about 1
STEPS = (10, 10, 1, 1, 2)
"""Tokens that a cache is given at once."""


MODELS = HYBRIDS | OTHERS | SHARED


@pytest.fixture(scope="module", params=each(MODELS))
def whole(request, tmp_path_factory):
    model_type, changes = MODELS[request.param]
    directory = tmp_path_factory.mktemp("hybrids") / "whole"
    random_model(model_type, **changes).save_pretrained(directory)
    return load_whole(directory, torch.float32)


@pytest.fixture(scope="module")
def some_tokens():
    return torch.randint(3, 400, (2, sum(STEPS)), generator=torch.Generator().manual_seed(1))


def removals(model):
    """By name: what a hybrid may lose."""
    fixed = fixed_sublayers(model.config)
    free = [s for s in layout_of(model.config).sublayers(model.config.num_hidden_layers) if s not in fixed]
    mixers = [s for s in free if s.kind == "attention"]
    return {
        "block 0": [s for s in free if s.block == 0],
        "every mixer but one": [s for s in mixers if s != Sublayer(1, "attention")],
        "every third sublayer": free[::3],
    }


def in_steps(model, tokens, steps=STEPS):
    """Logits of tokens that a cache is given bit by bit."""
    cache, parts = None, []
    for step in tokens.split(steps, 1):
        output, cache = forward(model, step, cache)
        parts.append(output.logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def test_a_pruned_hybrid_is_the_masked_whole_one(whole, some_tokens, tmp_path):
    prompt = {"input_ids": some_tokens[:, :8].clone(), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    prompt["attention_mask"][0, :3] = 0
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for name, removed in removals(whole).items():
        directory = tmp_path / name
        directory.mkdir()
        write_pruned(whole.config.name_or_path, removed, directory, {}, "")
        pruned = load_pruned(directory, torch.float32)
        with masked(whole, removed):
            at_once, in_parts = whole(some_tokens).logits, in_steps(whole, some_tokens)
            assert at_once.std() > 0.1, name
            assert torch.allclose(pruned(some_tokens).logits, at_once, atol=TOLERANCE), name
            assert torch.allclose(in_steps(pruned, some_tokens), in_parts, atol=TOLERANCE), f"{name}: with a cache"
    with masked(whole, removed):
        assert torch.equal(pruned.generate(**prompt, **settings), whole.generate(**prompt, **settings))


@torch.no_grad()
def test_the_search_gives_the_divergences_of_masking_and_leaves_what_is_fixed(whole, some_tokens):
    logits = whole(some_tokens).logits.log_softmax(-1)
    (removal,) = search(whole, some_tokens, some_tokens, n_removals=1, divergence="kl", mode="brute")
    fixed = fixed_sublayers(whole.config)
    here = layout_of(whole.config).sublayers(whole.config.num_hidden_layers)
    expected = {}
    for sublayer in here:
        if sublayer not in fixed:
            with masked(whole, [sublayer]):
                pruned = whole(some_tokens).logits.log_softmax(-1)
            expected[str(sublayer)] = (logits.exp() * (logits - pruned)).sum(-1).mean().item()
    assert removal.values == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_sublayers_cost_what_is_stored(whole, tmp_path):
    source = ModelDirectory(whole.config.name_or_path)
    costs, here = costs_of_noted(whole, source), layout_of(whole.config).sublayers(whole.config.num_hidden_layers)
    removed = removals(whole)["every third sublayer"]
    write_pruned(source, removed, tmp_path, {}, "")
    left = sum(p.numel() for p in load_pruned(tmp_path, torch.float32).parameters())
    assert costs["parameters"].whole - costs["parameters"].of(removed) == left
    assert costs["sublayers"].whole == len(here)
    keeps = {s for s, n_bytes in costs["kv_cache"].by_sublayer.items() if n_bytes}
    types = getattr(whole.config, "layer_types", ["attention"] * 4)
    n_with_keys = len(types) - getattr(whole.config, "num_kv_shared_layers", 0)
    without = [i for i, kind in enumerate(types) if i >= n_with_keys or kind in ("conv", "linear_attention")]
    assert keeps == {s for s in here if s.kind == "attention" and s.block not in without}


def costs_of_noted(whole, source):
    """Of a directory into whose config `fetch` would have written the layout."""
    if (layout := getattr(whole.config, LAYOUT_KEY, None)) is not None:
        setattr(source.config, LAYOUT_KEY, layout)
    return costs_of(source)


def test_a_model_without_keys_has_no_kv_cache_to_save():
    model_type, changes = HYBRIDS["mamba"]
    model = random_model(model_type, **changes)
    setattr(model.config, LAYOUT_KEY, find_layout(model).to_dict())
    costs = costs_of_config(model.config)
    assert costs.shares([Sublayer(0, "attention")])["kv_cache"] == 0
    with pytest.raises(ValueError, match="prune.budget in kv_cache: this model has no kv_cache at all"):
        allowance(Budget(unit="kv_cache", amount=0.5), costs)


def test_the_probe_finds_every_mixer():
    model_type, changes = HYBRIDS["qwen3_next"]
    layout = find_layout(random_model(model_type, **changes))
    norm = ("input_layernorm",)
    assert [layout.branch("attention", i) for i in range(4)] == [
        Branch("linear_attn", norm, n_outputs=1),
        Branch("self_attn", norm, n_outputs=2),
    ] * 2
    assert {layout.branch("mlp", i).core for i in range(4)} == {"mlp"}


@torch.no_grad()
def test_positions_go_on_where_the_cache_counts_by_a_layer_that_keeps_no_keys(some_tokens):
    model_type, changes = HYBRIDS["minimax"]
    model = random_model(model_type, **changes | {"layer_types": ["linear_attention", "full_attention"] * 2})
    tokens = some_tokens[:, :14]
    assert forward(model, tokens)[1].get_seq_length() == 0
    in_parts = in_steps(model, tokens, (10, 1, 1, 1, 1))
    assert torch.allclose(in_parts, model(tokens, use_cache=False).logits, atol=TOLERANCE)
    assert {find_layout(model).branch("attention", i).core for i in range(4)} == {"self_attn"}


def test_what_runs_in_parallel_is_one_sublayer():
    model_type, changes = HYBRIDS["granite 4"]
    mlp = find_layout(random_model(model_type, **changes)).branch("mlp", 0)
    assert mlp.members == ("post_attention_layernorm", "block_sparse_moe", "shared_mlp")


def test_blocks_of_one_sublayer_have_that_one_only_and_one_attention_stays():
    model_type, changes = HYBRIDS["nemotron_h"]
    model = random_model(model_type, **changes)
    setattr(model.config, LAYOUT_KEY, find_layout(model).to_dict())
    fixed = fixed_sublayers(model.config)
    assert {str(s) for s in layout_of(model.config).sublayers(6)} == {
        *("0.attention", "1.mlp", "2.attention", "3.mlp", "4.attention", "5.attention"),
    }
    assert fixed.pop(Sublayer(2, "attention")) == "it is the first by whose keys the cache counts tokens"
    assert set(fixed.values()) == {"the block has none"}
    assert len(fixed) == 6


def test_a_sublayer_that_blocks_of_one_lack_is_not_removed(tmp_path):
    random_model("mamba", state_size=8).save_pretrained(tmp_path / "whole")
    note_layout(ModelDirectory(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"^cannot remove 3\.mlp: the model has 4 sublayers in 4 blocks, and not"):
        prune(tmp_path / "whole", ["1.attention", "3.mlp"], None, tmp_path / "pruned")


def test_attentions_whose_keys_others_read_stay(tmp_path):
    model_type, changes = SHARED["gemma4"]
    model = random_model(model_type, **changes)
    assert {str(sublayer): why for sublayer, why in fixed_sublayers(model.config).items()} == {
        "2.attention": "its keys and values are read by the attention of 4",
        "3.attention": "its keys and values are read by the attention of 5",
    }
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="the attention of block 2 is removed, whose keys and values that of 4 reads"):
        write_pruned(tmp_path / "whole", [Sublayer(2, "attention")], tmp_path / "pruned", {}, "")


def test_attentions_that_choose_tokens_for_others_stay(tmp_path):
    model_type, changes = OTHERS["glm_moe_dsa"]
    model = random_model(model_type, **changes)
    setattr(model.config, LAYOUT_KEY, find_layout(model).to_dict())
    assert fixed_sublayers(model.config) == {
        Sublayer(1, "attention"): "its choice of tokens is read by the attention of 2"
    }
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="the attention of block 1 is removed, whose choice of tokens that of 2 reads"):
        write_pruned(tmp_path / "whole", [Sublayer(1, "attention")], tmp_path / "pruned", {}, "")


def test_a_pruned_config_has_what_blocks_differ_in_beside_what_they_skip(tmp_path):
    model_type, changes = SHARED["gemma4"]
    random_model(model_type, **changes).save_pretrained(tmp_path / "whole")
    removed = [Sublayer(1, "attention"), Sublayer(1, "mlp"), Sublayer(2, "mlp"), Sublayer(5, "attention")]
    write_pruned(tmp_path / "whole", removed, tmp_path, {}, "")
    blocks = json.loads((tmp_path / "config.json").read_text())["per_layer_config"]
    full = {"head_dim": 24, "num_key_value_heads": 1}
    assert blocks == {
        "1": {**full, "skip": ["attention", "mlp"]},
        "2": {"skip": ["mlp"]},
        "3": full,
        "5": {**full, "skip": ["attention"]},
    }
    # Of a type of block, whatever some of it skip.
    assert load_pruned(tmp_path).config.per_layer_config["full_attention"].head_dim == 24


def test_removing_every_attention_that_keeps_keys_is_refused(tmp_path):
    model_type, changes = HYBRIDS["lfm2"]
    random_model(model_type, **changes).save_pretrained(tmp_path / "whole")
    removed = [Sublayer(1, "attention"), Sublayer(3, "attention")]
    with pytest.raises(ValueError, match="every attention with keys and values is removed"):
        write_pruned(tmp_path / "whole", removed, tmp_path / "pruned", {}, "")


# Runs where finercut cannot be imported.
WITHOUT_FINERCUT = """
import sys
sys.modules["finercut"] = None
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
for directory in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(tokens).logits, directory / "logits.pt")
"""


def test_without_finercut_each_loads_by_its_own_file(some_tokens, tmp_path):
    directories = []
    for number, (model_type, changes) in enumerate(MODELS.values()):
        model = random_model(model_type, **changes)
        model.save_pretrained(tmp_path / f"whole-{number}")
        directory = tmp_path / f"pruned-{number}"
        directory.mkdir()
        if not is_declared(model.config):
            setattr(model.config, LAYOUT_KEY, find_layout(model).to_dict())
        write_pruned(tmp_path / f"whole-{number}", removals(model)["every third sublayer"], directory, {}, "")
        directories.append(directory)
    run_without_finercut(WITHOUT_FINERCUT, tmp_path, some_tokens, directories)
    for name, directory in zip(MODELS, directories, strict=True):
        with torch.no_grad():
            logits = load_pruned(directory, torch.float32)(some_tokens).logits
        assert torch.equal(torch.load(directory / "logits.pt"), logits), name
