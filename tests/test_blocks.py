"""Models that accelerate has spread over devices, run sublayer by sublayer."""

from accelerate import dispatch_model
from conftest import random_llama

from finercut.greedy import search


def test_a_model_spread_by_accelerate_gives_the_numbers_of_one_that_is_not(tokens, tmp_path):
    expected = list(search(random_llama(), tokens[:2], tokens[5:], 2))
    model = random_llama()
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    blocks = {f"model.layers.{i}": ["cpu", "disk"][i % 2] for i in range(4)}
    dispatch_model(model, outside | blocks, offload_dir=tmp_path)
    assert list(search(model, tokens[:2], tokens[5:], 2)) == expected
