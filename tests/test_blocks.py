"""Models run sublayer by sublayer, also where accelerate has spread them over devices."""

import pytest
import torch
from accelerate import dispatch_model
from conftest import random_llama
from family_models import OTHERS, random_model

from finercut.model.families import LAYOUT_KEY, layout_of
from finercut.model.loading import load_whole
from finercut.model.probe import find_layout
from finercut.selection.blocks import Blocks
from finercut.selection.greedy import search


def test_a_model_spread_by_accelerate_gives_the_numbers_of_one_that_is_not(tokens, tmp_path):
    expected = list(search(random_llama(), tokens[:2], tokens[5:], 2))
    model = random_llama()
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    blocks = {f"model.layers.{i}": ["cpu", "disk"][i % 2] for i in range(4)}
    dispatch_model(model, outside | blocks, offload_dir=tmp_path)
    assert list(search(model, tokens[:2], tokens[5:], 2)) == expected


def test_so_does_one_that_was_spread_when_it_was_loaded(tiny_model, tokens):
    expected = list(search(load_whole(tiny_model), tokens[:2], tokens[5:], 2))
    n_bytes = sum(p.nbytes for p in load_whole(tiny_model).parameters())
    model = load_whole(tiny_model, room={"cpu": n_bytes, "disk": n_bytes})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert list(search(model, tokens[:2], tokens[5:], 2)) == expected


def test_a_mapping_of_position_embeddings_is_not_taken_for_keys_and_values(tokens):
    expected = list(search(random_llama(), tokens[:2], tokens[5:], 2))
    model = random_llama()
    tables = {"full_attention": (torch.ones(1, tokens.shape[1], 4), torch.ones(1, tokens.shape[1], 4))}
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, args, named: (args, named | {"tables": tables}), with_kwargs=True)
    assert list(search(model, tokens[:2], tokens[5:], 2)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["deepseek_v4", "glm_moe_dsa"])
def test_numbers_of_tokens_go_from_block_to_block_to_the_bit(name, dtype, tokens):
    # Of a vocabulary beyond bfloat16's integers: another id chooses other experts.
    model_type, changes = OTHERS[name]
    model = random_model(model_type, **changes | {"vocab_size": 70_000}).to(dtype)
    setattr(model.config, LAYOUT_KEY, find_layout(model).to_dict())
    ids = tokens[:2] + 69_500
    with torch.inference_mode():
        blocks = Blocks(model, layout_of(model.config), ids[:1])
        states = blocks.embed(ids)
        for unit in blocks.units:
            states = blocks.run(unit, states, ())
        found, expected = blocks.logits(states).float(), model(ids, use_cache=False).logits.float()
    assert (found - expected).norm() <= 1e-2 * expected.norm()
