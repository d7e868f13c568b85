"""What each sublayer and head of a whole model does, against hand-made weights and full forwards."""

from __future__ import annotations

import pytest
import torch
from conftest import random_llama
from family_models import CASES, random_model
from transformers import GPT2Config, GPT2LMHeadModel, Olmo2Config, Olmo2ForCausalLM

from finercut.evaluation.redundancy import redundancy
from finercut.model.families import LAYOUT_KEY, is_declared
from finercut.model.probe import find_layout


@pytest.fixture
def model():
    return random_llama()


@torch.no_grad()
def test_a_sublayer_removed_alone_diverges_as_the_model_without_its_output_weights(model, tokens):
    found = {figures.sublayer: figures for figures in redundancy(model, tokens[:2], 16)}
    assert list(found) == [f"{block}.{kind}" for block in range(4) for kind in ("attention", "mlp")]
    whole = model(tokens[:1, :16]).logits[0].softmax(-1)
    model.model.layers[1].mlp.down_proj.weight.zero_()
    pruned = model(tokens[:1, :16]).logits[0].softmax(-1)
    assert found["1.mlp"].alone == pytest.approx((whole * (whole / pruned).log()).sum(-1).mean().item(), rel=1e-3)


@torch.no_grad()
def test_contributions_are_relative_to_the_stream_and_heads_are_told_apart(model, tokens):
    attention = model.model.layers[2].self_attn
    attention.o_proj.weight[:, 32:64].zero_()  # the second of four heads
    states = model(tokens[:2], output_hidden_states=True).hidden_states[2]  # (windows, tokens, hidden)
    caught = []
    hook = attention.o_proj.register_forward_hook(lambda _, args, output: caught.append((args[0], output)))
    model(tokens[:2])
    hook.remove()
    ((heads, written),) = caught
    figures = next(f for f in redundancy(model, tokens[:2], 1) if f.sublayer == "2.attention")
    assert figures.contribution == pytest.approx((written.norm(dim=-1) / states.norm(dim=-1)).mean().item(), rel=1e-4)
    third = (heads[..., 64:96] @ attention.o_proj.weight[:, 64:96].T).norm(dim=-1) / states.norm(dim=-1)
    assert figures.heads[1] == 0
    assert figures.heads[2] == pytest.approx(third.mean().item(), rel=1e-4)
    assert len(figures.heads) == 4


@torch.no_grad()
def test_an_outlier_channel_shows_as_a_peak(model, tokens):
    before, _ = (f.peak for f in redundancy(model, tokens[:1], 1)[:2])
    model.model.layers[0].input_layernorm.weight[5] = 1000.0
    after, mlp = (f.peak for f in redundancy(model, tokens[:1], 1)[:2])
    # all of the norm is in one of 128 channels
    assert before < 5 < after == pytest.approx(128**0.5, rel=0.01)
    assert mlp < 5


@pytest.mark.parametrize(
    "other",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
        lambda: Olmo2ForCausalLM(
            Olmo2Config(
                vocab_size=400,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                pad_token_id=2,
            )
        ),
    ],
    ids=["gpt2", "olmo2"],
)
def test_fused_projections_and_norms_after_the_sublayer_are_read_too(other, tokens):
    torch.manual_seed(0)
    found = redundancy(other().eval(), tokens[:1], 8)
    assert len(found) == 4
    for figures in found:
        assert 0 < figures.contribution < 100
        assert figures.alone > 0
        assert figures.peak > 1
        # what heads write adds up to what the attention writes, at least
        assert not figures.heads or sum(figures.heads) >= 0.99 * figures.contribution
    assert [len(figures.heads) for figures in found] == [4, 0, 4, 0]


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_measured(case, tokens):
    model_type, changes = CASES[case]
    model = random_model(model_type, **changes).eval()
    if not is_declared(model.config):
        setattr(model.config, LAYOUT_KEY, find_layout(model).to_dict())
    for figures in redundancy(model, tokens[:1, :8] % model.config.get_text_config().vocab_size, 8):
        assert 0 <= figures.contribution < 1000, figures
        assert figures.alone is None or figures.alone >= 0


@torch.no_grad()
def test_a_core_that_adds_to_the_stream_by_itself_contributes_what_it_adds(tokens):
    model = random_model("bloom")
    setattr(model.config, LAYOUT_KEY, find_layout(model).to_dict())
    block, caught = model.transformer.h[2], []
    hooks = [
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: caught.append(args[0])),
        block.mlp.dense_4h_to_h.register_forward_hook(lambda _, args, output: caught.append(output)),
    ]
    model(tokens[:2])
    for hook in hooks:
        hook.remove()
    stream, added = caught
    figures = next(f for f in redundancy(model, tokens[:2], 1) if f.sublayer == "2.mlp")
    assert figures.contribution == pytest.approx((added.norm(dim=-1) / stream.norm(dim=-1)).mean().item(), rel=1e-4)
