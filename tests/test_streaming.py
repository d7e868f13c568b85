"""Streamed models against the same models in memory."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import random_llama

from finercut.checkpoint.prune import prune
from finercut.model.loading import load, load_whole
from finercut.model.streaming import _spread, stream
from finercut.selection.greedy import search

CPU = torch.device("cpu")


def n_bytes(module):
    return sum(p.nbytes for p in module.parameters())


def least(model):
    """What lies outside of attentions and MLPs, and two of the largest of these."""
    layers = model.model.layers
    cores = [core for layer in layers for core in (layer.self_attn, layer.mlp)]
    return n_bytes(model) - sum(map(n_bytes, cores)) + 2 * max(map(n_bytes, cores))


@pytest.fixture(params=["tied", "untied and sharded"])
def directory(request, tmp_path):
    tied = request.param == "tied"
    random_llama(tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size="5GB" if tied else "300KB")
    assert (tmp_path / "model.safetensors.index.json").exists() != tied
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_search_gives_the_resident_searchs_numbers(directory, tokens, dtype):
    resident, streamed = (load_whole(directory, dtype) for _ in range(2))
    brings = stream(streamed, CPU, least(streamed))
    assert list(search(streamed, tokens[:4], tokens[4:], 5)) == list(search(resident, tokens[:4], tokens[4:], 5))
    assert brings.bytes_brought > n_bytes(streamed)


@pytest.mark.parametrize("n_blocks", [4, 12])
def test_weights_on_the_device_stay_within_the_limit_at_any_depth(n_blocks, tokens):
    model = random_llama(num_hidden_layers=n_blocks)
    layers = model.model.layers
    allowed = least(random_llama(num_hidden_layers=4)) + n_blocks * 2 * 128 * 4  # norms stay on the device
    homes = {p.data_ptr() for layer in layers for core in (layer.self_attn, layer.mlp) for p in core.parameters()}
    brings = stream(model, CPU, allowed)
    there = []
    for layer in layers:
        for core in (layer.self_attn, layer.mlp):
            core.register_forward_pre_hook(
                lambda core, _: there.append(all(p.data_ptr() not in homes for p in core.parameters()))
            )
    with torch.inference_mode():
        model(tokens)
    assert there == [True] * 2 * n_blocks
    rest = n_bytes(model) - sum(n_bytes(layer.self_attn) + n_bytes(layer.mlp) for layer in layers)
    assert brings.device_bytes + rest <= allowed


def test_the_next_sublayers_weights_are_fetched_ahead(tokens):
    model = random_llama()
    brings = stream(model, CPU, least(model))
    attention, mlp = (n_bytes(m) for m in (model.model.layers[0].self_attn, model.model.layers[0].mlp))
    with torch.inference_mode():
        model(tokens)
        assert brings.bytes_late == attention, "the very first"
        assert brings.bytes_brought == 4 * (attention + mlp) + attention, "each once, and the first one again"
        layer = model.model.layers[2]
        layer.mlp, mlp_of_2 = torch.nn.Identity(), layer.mlp
        model(tokens)
        late = brings.bytes_late
        assert late > attention, "expected another one next"
        model(tokens)
        assert brings.bytes_late == late, "the order of the last time is remembered"
        layer.mlp = mlp_of_2
    assert brings.device_bytes == 2 * mlp


def test_what_there_is_room_for_stays_on_the_device(tokens):
    model = random_llama()
    expected = model(tokens).logits
    cores = [core for layer in model.model.layers for core in (layer.self_attn, layer.mlp)]
    room = n_bytes(cores[0]) + n_bytes(cores[1])
    brings = stream(model, CPU, least(model) + room)
    with torch.inference_mode():
        model(tokens)
        before = brings.bytes_brought
        assert torch.equal(model(tokens).logits, expected)
    kept = sum(map(n_bytes, cores)) - (brings.bytes_brought - before)
    assert 2 * n_bytes(cores[0]) <= kept <= room


def test_what_stays_lies_evenly_among_the_rest():
    assert _spread([1] * 9, 3) == [False, False, True] * 3
    assert _spread([2, 2], 3) == [False, True]
    assert _spread([2, 2], 0) == [False, False]


def test_threads_in_different_sublayers_at_once_do_not_disturb_each_other(tokens):
    model = random_llama()
    expected = [model(window[None]).logits for window in tokens]
    stream(model, CPU, least(model))

    def run(window):
        with torch.inference_mode():
            return model(window[None]).logits

    with ThreadPoolExecutor(6) as threads:
        for _ in range(5):
            for found, logits in zip(threads.map(run, tokens), expected, strict=True):
                assert torch.equal(found, logits)


def test_a_forward_that_fails_gives_its_slot_back(tokens):
    model = random_llama()
    expected = model(tokens).logits
    stream(model, CPU, least(model))
    attention = model.model.layers[1].self_attn
    for _ in range(3):
        with pytest.raises(RuntimeError), torch.inference_mode():
            attention(torch.zeros(1, 3, 7), position_embeddings=(torch.zeros(1), torch.zeros(1)), attention_mask=None)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, expected)


def test_a_model_that_fits_is_moved_whole():
    model = random_llama()
    assert stream(model, CPU, n_bytes(model)) is None


def test_a_limit_below_the_least_is_refused():
    model = random_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="do not hold the embeddings, the head and 2 sublayers of this model: .* GiB"):
        stream(model, CPU, least(model) - 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_streaming_leaves_the_threads_of_others_as_they_were(tokens):
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = random_llama()
        stream(model, CPU, least(model))
        with torch.inference_mode():
            model(tokens)
        with ThreadPoolExecutor(1) as new:
            assert (torch.get_num_threads(), new.submit(torch.get_num_threads).result()) == (2, 2)
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize("pruned", [False, True])
def test_a_streamed_model_may_compute_in_another_dtype_than_its_files_have(pruned, tokens, tmp_path):
    random_llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    if pruned:
        prune(tmp_path / "model", ["1.attention", "2.mlp"], None, tmp_path / "pruned")
    directory = tmp_path / ("pruned" if pruned else "model")
    expected = load(directory, torch.float32)
    streamed = load(directory, torch.float32, weights_gib=least(expected) / 2**30)
    waiting = [p for p in streamed.parameters() if p.dtype == torch.bfloat16]
    assert len(waiting) == 4 * (4 + 3) - (4 + 3 if pruned else 0), "as the files have them"
    with torch.inference_mode():
        assert torch.equal(streamed(tokens).logits, expected(tokens).logits)
