"""Models run sublayer by sublayer, also where accelerate has spread them over devices."""

import torch
from accelerate import dispatch_model
from conftest import random_llama

from finercut.model.loading import load_whole
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
