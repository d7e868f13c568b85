"""What the probe finds in models nobody declared is what was declared, or what was built here by hand."""

from dataclasses import replace

import pytest
import torch
from family_models import CASES, random_model
from own_code import OwnAttention, random_own
from torch import nn

from finercut.model.families import LAYOUT_KEY, Branch, Layout, Variant, base_architecture, layout_of
from finercut.model.masking import masked
from finercut.model.probe import find_layout
from finercut.selection.greedy import search
from finercut.sublayers import Sublayer, candidates

# OPT's norms lie on the stream there: what runs before its cores is left in the blocks, where it is not declared.
FOUND = [name for name in CASES if name != "opt post-norm"]


@pytest.mark.parametrize("name", FOUND)
def test_it_finds_what_is_declared(name):
    model_type, changes = CASES[name]
    model = random_model(model_type, **changes)
    found, declared = find_layout(model), layout_of(model.config)
    if model_type == "opt":  # the activation is a module, which may stay as well
        declared = replace(declared, mlp=Branch("fc2", before=("final_layer_norm", "fc1", "activation_fn")))
    assert (
        replace(found, attention=replace(found.attention, n_outputs=None), mlp=replace(found.mlp, n_outputs=None))
        == declared
    )
    assert (found.attention.n_outputs, found.mlp.n_outputs) == (2, 1)


def test_the_model_is_as_it_was(tokens):
    model = random_model("llama")
    modules = list(model.modules())
    with torch.no_grad():
        before = model(tokens[:1]).logits
        find_layout(model)
        assert torch.equal(model(tokens[:1]).logits, before)
    assert list(model.modules()) == modules
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2, 3]
    assert not any(module._forward_hooks for module in modules)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("bert", {}, "runs for the attention and for the MLP"),
        ("xlstm", {"hidden_size": 64, "num_heads": 4, "num_blocks": 4}, "mlstm_layer has no layer_idx"),
        ("openai-gpt", {}, "0 of a block's modules let tokens see each other"),
        (
            "dbrx",
            {
                "d_model": 64,
                "n_heads": 4,
                "n_layers": 4,
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1},
            },
            "what seems to be a core is given no hidden states",
        ),
        ("gpt_neox_japanese", {}, "block 3 less its attention is not the block with that masked"),
    ],
)
def test_what_is_no_pair_of_residual_sublayers_is_refused_with_what_was_found(model_type, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        find_layout(random_model(model_type, **changes))
    assert "Found blocks at" in str(caught.value)
    assert "'finercut_layout'" in str(caught.value)


def test_a_core_may_add_to_the_stream_by_itself():
    layout = find_layout(random_model("bloom"))
    assert (layout.attention, layout.mlp) == (
        Branch("self_attention", before=("input_layernorm",), n_outputs=2, stream=1),
        Branch("mlp", before=("post_attention_layernorm",), n_outputs=1, stream=1),
    )


@pytest.fixture
def own():
    return random_own()


def test_code_of_a_models_own_is_found_and_searched_but_not_written(own, tokens):
    layout = find_layout(own)
    assert layout == Layout(
        "tower",
        attention=Branch("look", before=("pre",), n_outputs=1),
        mlp=Branch("narrow", before=("widen",), after=("calm",), n_outputs=1),
    )
    setattr(own.config, LAYOUT_KEY, layout.to_dict())
    with torch.no_grad():
        whole = own(tokens[:1]).logits.log_softmax(-1)
        expected = {}
        for candidate in candidates(3):
            with masked(own, candidate.sublayers):
                pruned = own(tokens[:1]).logits.log_softmax(-1)
            expected[str(candidate)] = (whole.exp() * (whole - pruned)).sum(-1).mean().item()
    (removal,) = search(own, tokens[:1], tokens[:1], n_removals=1, divergence="kl", mode="brute")
    assert removal.values == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="cannot write a pruned own model: its code is not transformers'"):
        base_architecture(own.config)


def test_an_attention_that_does_more_with_its_number_than_caching_is_refused(own):
    def forward(self, *, x, cache):
        return OwnAttention.forward(self, x=x * (1 + self.layer_idx), cache=cache)

    for block in own.tower:
        block.look.forward = forward.__get__(block.look)
    with pytest.raises(ValueError, match="without the attention of block 0 and with a KV cache it computes something"):
        find_layout(own)


class Scored(nn.Module):
    """Returns scores beside what it adds, as mixtures of experts do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x), x.sum(-1)


def test_a_block_may_ask_for_several_outputs_of_the_class_of_its_experts_alone(own):
    def forward(self, x, cache=None):
        x = x + self.look(x=self.pre(x), cache=cache)[:, -x.shape[1] :]
        added = self.narrow(self.widen(x))
        if isinstance(self.narrow, Scored):
            added, _ = added
        return x + self.calm(added), None

    for block in own.tower:
        block.narrow = Scored(block.narrow)
        block.forward = forward.__get__(block)
    assert find_layout(own).mlp == Branch("narrow", before=("widen",), after=("calm",), n_outputs=1)


def test_a_block_without_sublayers_has_none(own):
    own.tower[1].forward = lambda x, cache=None: (x, None)
    layout = find_layout(own)
    assert layout.sublayers(3) == [Sublayer(i, kind) for i in (0, 2) for kind in ("attention", "mlp")]
    assert layout.variants == (Variant((1,), None, None),)


def test_a_model_without_a_list_of_blocks_is_refused(own):
    own.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="none of its lists holds 5 modules. Found tower, other"):
        find_layout(own)
