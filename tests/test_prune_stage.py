"""The stage `prune`, after a search on the tiny model."""

import pytest
import torch
from conftest import random_llama
from safetensors.torch import load_file
from stage_project import settings, with_changes

from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.model.tensors import weights_bytes
from finercut.selection.trajectory import read_trajectory
from finercut.sublayers import parse
from pipelines import paths, prune, search


def test_prune_cuts_the_trajectory_at_the_budget(project, tokens):
    search.run(settings())
    found = read_trajectory(paths.TRAJECTORY)
    for budget, n_removals in (({"unit": "sublayers", "amount": 0.5}, 4), ({"unit": "sublayers", "amount": 2}, 2)):
        report = prune.run(with_changes(prune__budget=budget))
        removed = [s for r in found.removals[:n_removals] for s in parse(r.sublayer).sublayers]
        assert report.removed == [str(s) for s in removed]
        assert report.shares["sublayers"] == n_removals / 8
        assert report.divergence == found.removals[n_removals - 1].divergence
        whole, pruned = load_whole(paths.MODEL), load_pruned(paths.PRUNED)
        assert report.pruned_parameters == sum(p.numel() for p in pruned.parameters())
        assert report.whole_parameters == sum(p.numel() for p in whole.parameters())
        assert report.pruned_bytes == weights_bytes(paths.PRUNED)
        n_attentions = sum(s.kind == "attention" for s in removed)
        assert report.shares["kv_cache"] == n_attentions / 4
        assert report.pruned_kv_bytes_per_token == (4 - n_attentions) * 2 * 2 * 32 * 4
        with torch.no_grad(), masked(whole, removed):
            assert torch.allclose(whole(tokens).logits, pruned(tokens).logits, atol=1e-5)
    assert paths.REMOVALS_PICTURE.read_bytes().startswith(b"\x89PNG")


def test_the_divergence_in_the_trajectory_is_that_of_the_pruned_checkpoint(project, tokens):
    search.run(with_changes(search__removals=3))
    report = prune.run(with_changes(prune__budget={"unit": "sublayers", "amount": 3}))
    with torch.no_grad():
        p, q = (m(tokens[:4]).logits.log_softmax(-1) for m in (load_whole(paths.MODEL), load_pruned(paths.PRUNED)))
    m = ((p.exp() + q.exp()) / 2).log()
    js = ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2
    assert report.divergence == pytest.approx(js.mean().item(), rel=1e-4)


def test_pruning_twice_gives_the_same_bytes(project):
    search.run(settings())
    contents = []
    for _ in range(2):
        prune.run(with_changes(prune__budget={"unit": "sublayers", "amount": 3}))
        contents.append({p.name: p.read_bytes() for p in [*paths.PRUNED.iterdir(), paths.REMOVALS_PICTURE]})
    assert contents[0] == contents[1]


def test_the_pruned_directory_brings_its_tokenizer_and_card(project):
    search.run(settings())
    prune.run(with_changes(prune__budget={"unit": "sublayers", "amount": 3}))
    names = {p.name for p in paths.PRUNED.iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_finercut.py"}
    card = (paths.PRUNED / "README.md").read_text()
    assert "tiny, less 3 of 8 sublayers" in card
    assert "| sublayers | 37.5% |" in card
    assert "vllm serve" in card


def test_a_trajectory_of_another_model_is_refused_and_the_old_checkpoint_kept(project):
    search.run(settings())
    prune.run(with_changes(prune__budget={"unit": "sublayers", "amount": 3}))
    before = load_file(paths.PRUNED / "model.safetensors").keys()
    random_llama(hidden_size=64, num_attention_heads=2, num_key_value_heads=1).save_pretrained(paths.MODEL)
    with pytest.raises(ValueError, match="run `finercut search` again"):
        prune.run(with_changes(prune__budget={"unit": "sublayers", "amount": 2}))
    assert load_file(paths.PRUNED / "model.safetensors").keys() == before
