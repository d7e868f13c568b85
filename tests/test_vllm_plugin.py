"""vLLM's model classes with sublayers removed, built and loaded here without an engine; test_serving.py has engines."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import random_llama
from safetensors.torch import load_file, save_file
from torch import nn

from finercut.checkpoint import write_pruned
from finercut.sublayers import Sublayer

# The first sublayer of the model, a whole block in the middle, the last one of the model.
REMOVED = [Sublayer(0, "attention"), Sublayer(2, "attention"), Sublayer(2, "mlp"), Sublayer(3, "mlp")]


def random_mistral():
    from transformers import MistralConfig, MistralForCausalLM

    settings = random_llama().config.to_dict()
    return MistralForCausalLM(
        MistralConfig(
            **{name: settings[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}, head_dim=32
        )
    )


@pytest.fixture(scope="module", params=[random_llama, random_mistral])
def pruned(request, tmp_path_factory):
    """Checkpoint of a model less REMOVED."""
    directory = tmp_path_factory.mktemp("vllm")
    request.param().save_pretrained(directory / "whole")
    write_pruned(directory / "whole", REMOVED, directory / "pruned", {}, "")
    return directory / "pruned"


def engine_config(directory):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(directory), skip_tokenizer_init=True, dtype="float32", max_model_len=64)
    return arguments.create_engine_config()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds a checkpoint's model as vLLM's worker does: (model, its VllmConfig)."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model

    store = tmp_path_factory.mktemp("store") / "store"

    def build_one(directory):
        config = engine_config(directory)
        with set_current_vllm_config(config):
            parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
            parallel_state.ensure_model_parallel_initialized(1, 1)
            model = initialize_model(config)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        return model, config

    yield build_one
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def test_only_kept_sublayers_have_parameters_and_a_kv_cache(pruned, build):
    model, config = build(pruned)
    norms = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
    cores = {"attention": {"self_attn.qkv_proj", "self_attn.o_proj"}, "mlp": {"mlp.gate_up_proj", "mlp.down_proj"}}
    expected = {"model.embed_tokens", "model.norm"} | {
        f"model.layers.{block}.{member}"
        for block in range(4)
        for kind in norms
        for member in {norms[kind], *cores[kind]}
        if Sublayer(block, kind) not in REMOVED
    }
    names = {name.removesuffix(".weight") for name, _ in model.named_parameters()} - {"lm_head"}
    assert names == expected
    caches = config.compilation_config.static_forward_context
    assert sorted(caches) == ["model.layers.1.self_attn.attn", "model.layers.3.self_attn.attn"]


def test_the_model_is_vllms_own_with_all_it_can_do(pruned, build):
    from vllm import ModelRegistry
    from vllm.model_executor.models import llama, utils
    from vllm.model_executor.models.interfaces import supports_lora, supports_pp

    model, config = build(pruned)
    (architecture,) = config.model_config.architectures
    assert isinstance(model, ModelRegistry.models[architecture.removeprefix("FinerCut")].load_model_cls())
    assert supports_lora(model)
    assert supports_pp(model)
    assert llama.make_layers is utils.make_layers
    assert utils.make_layers.__module__ == utils.__name__


def test_registering_again_changes_nothing():
    from vllm import ModelRegistry

    from finercut.vllm_plugin import register

    register()
    first = dict(ModelRegistry.models)
    register()
    assert ModelRegistry.models == first
    assert {"FinerCutLlamaForCausalLM", "FinerCutMistralForCausalLM"} <= first.keys()


@pytest.mark.parametrize(
    ("taken", "added", "message"),
    [
        # vLLM alone takes both of the next: k_proj is a part of qkv_proj, and it does not look for linear weights
        (["model.layers.1.self_attn.k_proj.weight"], [], "missing: model.layers.1.self_attn.k_proj.weight"),
        (["model.layers.0.mlp.down_proj.weight"], [], "missing: model.layers.0.mlp.down_proj.weight"),
        ([], ["model.layers.0.self_attn.o_proj.weight"], "no module or parameter named .layers.0.self_attn.o_proj"),
        ([], ["model.layers.0.input_layernorm.weight"], "no module or parameter named .layers.0.input_layernorm"),
        # vLLM alone ignores it
        ([], ["model.layers.1.mlp.down_proj.bias"], "unexpected: model.layers.1.mlp.down_proj.bias"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(pruned, build, tmp_path, taken, added, message):
    directory = shutil.copytree(pruned, tmp_path / "doctored")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in taken:
        del tensors[name]
    save_file(tensors | {name: torch.zeros(128) for name in added}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        build(directory)


def test_models_with_other_removals_share_no_compiled_graph(pruned, tmp_path):
    directory = tmp_path / "pruned"
    hashes = set()
    for removed in (REMOVED, REMOVED[:-1]):
        shutil.rmtree(directory, ignore_errors=True)
        write_pruned(pruned.with_name("whole"), removed, directory, {}, "")
        hashes.add(engine_config(directory).compute_hash())
    assert len(hashes) == 2


class Fused(nn.Module):
    """A norm that adds what is to be added first, as vLLM's do."""

    def forward(self, x, residual=None):
        if residual is None:
            return x / x.norm()
        return (x + residual) / (x + residual).norm(), x + residual


class Core(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, positions, hidden_states):
        return self.scale * hidden_states.square()


class FusedBlock(nn.Module):
    """As in Llama; with norms after the cores, as in Gemma 2."""

    def __init__(self, attention_scale):
        super().__init__()
        self.norm_1, self.norm_2 = Fused(), Fused()
        self.after_1, self.after_2 = Fused(), Fused()
        self.attention, self.mlp = Core(attention_scale), Core(2.0)

    def forward(self, x, residual=None):
        x, residual = (self.norm_1(x), x) if residual is None else self.norm_1(x, residual)
        x = self.after_1(self.attention(positions=torch.arange(3), hidden_states=x))
        x, residual = self.norm_2(x, residual)
        return self.after_2(self.mlp(torch.arange(3), x)), residual


class AddingBlock(FusedBlock):
    """As in GPT-2: it adds to the residual stream itself."""

    def forward(self, x, residual=None):
        x = x + self.after_1(self.attention(torch.arange(3), self.norm_1(x)))
        return x + self.after_2(self.mlp(torch.arange(3), self.norm_2(x))), torch.zeros_like(x)


class PostNormBlock(FusedBlock):
    """As in OLMo 2: the core sees the residual stream as it is."""

    def forward(self, x, residual=None):
        x = x + self.after_1(self.attention(torch.arange(3), x))
        return x + self.after_2(self.mlp(torch.arange(3), x)), torch.zeros_like(x)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("block_class", [FusedBlock, AddingBlock, PostNormBlock])
def test_a_removed_sublayer_adds_nothing_however_a_block_adds(block_class, first):
    from vllm.config import VllmConfig

    from finercut.vllm_models import remove_sublayer

    class Silent(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    layout = {
        kind: {"before": [] if block_class is PostNormBlock else [f"norm_{n}"], "core": kind, "after": [f"after_{n}"]}
        for n, kind in enumerate(("attention", "mlp"), start=1)
    }
    state = (torch.tensor([1.0, 2.0, 3.0]), None if first else torch.tensor([0.5, -1.0, 0.25]))
    for kind in ("attention", "mlp"):
        whole, block = block_class(3.0), block_class(3.0)
        setattr(whole, layout[kind]["after"][0], Silent())
        remove_sublayer(block, "layers.0", kind, layout, VllmConfig())
        assert torch.allclose(sum(block(*state)), sum(whole(*state)))
