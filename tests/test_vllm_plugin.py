"""vLLM's model classes with sublayers removed, as its worker builds them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from inspect import signature
from typing import Any

import pytest
import torch
from conftest import random_llama
from family_models import CASES, HYBRIDS, OTHERS, UNDECLARED, each, random_model
from multimodal_models import save
from quantised_checkpoints import settings
from safetensors.torch import load_file
from torch import nn
from vllm_cases import REMOVED, model_for_vllm, sublayers, write

from finercut.checkpoint import quantise
from finercut.checkpoint.writing import write_pruned
from finercut.model.directory import ModelDirectory
from finercut.model.families import layout_of
from finercut.model.layouts import note_layout
from finercut.sublayers import Sublayer


def engine_config(directory):
    from vllm.engine.arg_utils import EngineArgs

    from finercut.serving.vllm_process import load_class

    load_class(str(directory))
    arguments = EngineArgs(model=str(directory), skip_tokenizer_init=True, dtype="float32", max_model_len=64)
    return arguments.create_engine_config()


@dataclass(frozen=True)
class Built:
    """A pruned model as vLLM's worker builds it, without its weights."""

    model: Any
    config: Any
    layout: Any
    tensors: dict[str, torch.Tensor]
    """What its checkpoint holds."""
    gone: dict[str, torch.Tensor]
    """What the whole model's holds besides."""

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.config):
            self.model.load_weights(iter(tensors.items()))


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    with set_current_vllm_config(VllmConfig()):
        store = tmp_path_factory.mktemp("store") / "store"
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(scope="module", params=each(CASES))
def built(request, tmp_path_factory, distributed) -> Built:
    """Every family less REMOVED."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    model = model_for_vllm(request.param)
    directory = write(model, REMOVED, tmp_path_factory.mktemp("built") / "pruned")
    config = engine_config(directory)
    with set_current_vllm_config(config):
        pruned = initialize_model(config)
    whole = load_file(directory.with_name("whole model") / "model.safetensors")
    tensors = load_file(directory / "model.safetensors")
    gone = {name: tensor for name, tensor in whole.items() if name not in tensors}
    return Built(pruned, config, layout_of(model.config), tensors, gone)


def test_only_kept_sublayers_have_weights_and_a_kv_cache(built):
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    layers = built.config.compilation_config.static_forward_context
    caches = [name for name, layer in layers.items() if isinstance(layer, Attention)]
    assert sorted(map(extract_layer_index, caches)) == [2, 3]
    experts = [name for name in layers if name not in caches]
    assert sorted(map(extract_layer_index, experts)) == ([0, 2] if "experts" in " ".join(built.tensors) else [])
    assert sorted(built.config.compilation_config.static_all_moe_layers) == sorted(experts)
    blocks = built.layout.blocks.rpartition(".")[2]
    n_elements = sum(p.numel() for name, p in built.model.named_parameters() if f".{blocks}." in name)
    assert n_elements == sum(t.numel() for name, t in built.tensors.items() if f".{blocks}." in name)


def test_weights_that_do_not_fit_the_config_are_refused(built):
    with_all = next(name for name in built.tensors if ".2." in name)
    block = with_all[: with_all.index(".2.") + 3]
    for name in [name for name in built.tensors if name.startswith(block)]:
        # vLLM alone takes most of them: what is a part of a packed weight, an expert, any linear layer
        with pytest.raises(ValueError, match=f"do not belong together: missing: {name}"):
            built.load({n: t for n, t in built.tensors.items() if n != name})
    for name, tensor in built.gone.items():
        with pytest.raises(ValueError, match=r"no module or parameter named|do not belong together: unexpected"):
            built.load(built.tensors | {name: tensor})
    # vLLM alone ignores some biases
    with pytest.raises(ValueError, match=r"no module or parameter named|do not belong together: unexpected"):
        built.load(built.tensors | {f"{block}of_another_model.bias": torch.zeros(128)})
    built.load(built.tensors)


def test_a_quantised_weight_without_its_scale_is_refused(tiny_pruned):
    from finercut.serving import vllm_models

    config = ModelDirectory(tiny_pruned).config
    config.quantization_config = quantise.quantization_config(settings("w4a16", group_size=32))
    stored = set()
    for name in ModelDirectory(tiny_pruned).tensors:
        stored |= {f"{name}_{part}" for part in ("packed", "scale", "shape")} if "proj" in name else {name}
    vllm_models._check_names(config, stored, str)
    for part in ("packed", "scale"):
        lacking = f"model.layers.1.mlp.up_proj.weight_{part}"
        with pytest.raises(ValueError, match=f"do not belong together: missing: {lacking}"):
            vllm_models._check_names(config, stored - {lacking}, str)


def test_a_rank_that_is_given_its_own_experts_alone_lacks_none(tmp_path):
    from finercut.serving import vllm_models

    whole, pruned = tmp_path / "whole", tmp_path / "pruned"
    random_model("mixtral").save_pretrained(whole)
    pruned.mkdir()
    write_pruned(ModelDirectory(whole), [Sublayer(1, "attention")], pruned, {}, "")
    directory = ModelDirectory(pruned)
    own = {name for name in directory.tensors if ".experts.1." not in name}
    assert own < set(directory.tensors)
    vllm_models._check_names(directory.config, own, str, few_experts=True)
    with pytest.raises(ValueError, match=r"missing: .*\.experts\.1\."):
        vllm_models._check_names(directory.config, own, str)


def test_a_scheme_that_vllm_multiplies_wrongly_is_refused(distributed, monkeypatch):
    from finercut.serving import vllm_foresight

    asked = quantise.quantization_config(settings("w7a8"))
    assert vllm_foresight._scheme_refusal(asked, 7, "float32") is None
    fill = vllm_foresight._fill
    monkeypatch.setattr(vllm_foresight, "_fill", lambda *given: 1.1 * fill(*given))
    assert "wrong by 9%" in vllm_foresight._scheme_refusal(asked, 7, "float32")


def test_the_model_is_vllms_own_with_all_it_can_do(built):
    from vllm import ModelRegistry
    from vllm.model_executor.models import llama, utils
    from vllm.model_executor.models.interfaces import supports_lora, supports_pp

    (architecture,) = built.config.model_config.architectures
    base = ModelRegistry.models[architecture.removeprefix("FinerCut")].load_model_cls()
    assert isinstance(built.model, base)
    assert supports_lora(built.model) == supports_lora(base)
    assert supports_pp(built.model) == supports_pp(base)
    assert llama.make_layers is utils.make_layers
    assert utils.make_layers.__module__ == utils.__name__


@pytest.mark.parametrize(
    ("case", "more", "removed"),
    [
        ("falcon", {}, ["1.block"]),
        ("falcon_h1", {}, ["1.block"]),
        ("gpt_oss", {}, ["1.block"]),
        ("dbrx", {"d_model": 128}, ["1.block"]),
        (
            "longcat_flash",
            {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_type": "identity"},
            ["2.block", "3.block"],
        ),
    ],
)
def test_a_block_without_sublayers_hands_on_the_stream_whatever_vllm_calls_and_expects_of_them(
    case, more, removed, distributed, tmp_path
):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    model_type, changes = (UNDECLARED | HYBRIDS | OTHERS)[case]
    random_model(model_type, **changes | {"hidden_size": 128} | more).save_pretrained(tmp_path / "whole model")
    layout = note_layout(ModelDirectory(tmp_path / "whole model")).layout
    config = engine_config(write(None, sublayers(*removed), tmp_path / "pruned"))
    with set_current_vllm_config(config):
        block = initialize_model(config).get_submodule(f"{layout.blocks}.1")
    arguments = signature(block.forward).parameters
    given = {"hidden_states": torch.randn(3, 128)}
    if "residual" in arguments:
        given["residual"] = torch.randn(3, 128)
    before = sum(given.values())
    positions = "positions" if "positions" in arguments else "position_ids"
    after = block(**{positions: torch.arange(3)}, **given)
    assert torch.equal(sum(after) if isinstance(after, tuple) else after, before)


def test_a_model_that_drafts_for_another_lacks_its_removed_sublayers_too(distributed, tiny_pruned):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    config = engine_config(tiny_pruned)
    with set_current_vllm_config(config):
        drafter = initialize_model(config, prefix="draft_model")
    names = {name for name, _ in drafter.named_parameters()}
    removed = ModelDirectory(tiny_pruned).removed
    assert removed
    for sublayer in removed:
        core = "self_attn" if sublayer.kind == "attention" else "mlp"
        assert not [name for name in names if name.startswith(f"model.layers.{sublayer.block}.{core}.")]
    assert [name for name in names if name.startswith("model.layers.0.")]


def test_a_rank_of_a_pipeline_without_an_attention_is_refused_by_name(distributed, tmp_path):
    from finercut.serving.vllm_models import _check_ranks

    random_model("llama", **CASES["llama"][1]).save_pretrained(tmp_path / "whole model")
    config = engine_config(write(None, sublayers("0.attention", "1.block"), tmp_path / "pruned"))
    _check_ranks(config)
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ValueError, match=r"of blocks 0 to 1, those of rank 0, every attention is removed"):
        _check_ranks(config)


def test_pipeline_parallel_is_refused_where_vllm_runs_transformers_code(distributed, tmp_path):
    from vllm.model_executor.model_loader.utils import initialize_model

    config = engine_config(write(model_for_vllm("olmo2"), REMOVED, tmp_path / "pruned"))
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ValueError, match="pipeline_parallel_size = 2.*Olmo2.*use tensor_parallel_size"):
        initialize_model(config)


def test_registering_again_changes_nothing():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    from finercut.model.families import FAMILIES
    from finercut.serving.vllm_plugin import register

    register()
    first = dict(ModelRegistry.models)
    register()
    assert ModelRegistry.models == first
    bases = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] for family in FAMILIES}
    assert {f"FinerCut{base}" for base in bases & first.keys()} <= first.keys()
    assert bases - first.keys() == {"Gemma4UnifiedForCausalLM"}  # vLLM has none of these


@pytest.mark.parametrize(("model_type", "see_each_other"), [("llava", False), ("gemma3", True)])
def test_the_tokens_of_an_image_see_each_other_where_they_do_in_the_whole_model(model_type, see_each_other, tmp_path):
    from vllm.transformers_utils import model_arch_config_convertor as convertors
    from vllm.transformers_utils.config import get_config

    from finercut.serving.vllm_plugin import register

    register()
    save(model_type, tmp_path / "whole model")
    config = get_config(write(None, REMOVED, tmp_path / "pruned"), trust_remote_code=False)
    convertor = convertors.MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, convertors.ModelArchConfigConvertorBase)
    read = convertor(config, config.get_text_config(), revision=None).convert()
    assert (read.model_type, read.is_mm_prefix_lm) == (model_type, see_each_other)
    assert read.total_num_hidden_layers == 4
    assert config.to_dict()["model_type"] == f"finercut_{model_type}"


@pytest.mark.parametrize("model_type", ["llava", "gemma3", "qwen2_5_vl", "smolvlm", "idefics3"])
def test_a_language_model_inside_another_has_kept_sublayers_only(model_type, distributed, tmp_path):
    if model_type != "idefics3":
        pytest.importorskip("torchvision", reason="vLLM's code of this model imports it")
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models.utils import extract_layer_index

    save(model_type, tmp_path / "whole model")
    directory = write(None, REMOVED, tmp_path / "pruned")
    config, tensors = engine_config(directory), load_file(directory / "model.safetensors")
    with set_current_vllm_config(config):
        pruned = initialize_model(config)
        layers = config.compilation_config.static_forward_context
        caches = [name for name, layer in layers.items() if isinstance(layer, Attention)]
        assert sorted(map(extract_layer_index, caches)) == [2, 3]
        lost = next(name for name in tensors if name.endswith("layers.2.mlp.down_proj.weight"))
        with pytest.raises(ValueError, match=f"do not belong together: missing: {lost}"):
            pruned.load_weights((name, tensor) for name, tensor in tensors.items() if name != lost)
        pruned.load_weights(iter(tensors.items()))


def test_models_with_other_removals_share_no_compiled_graph(distributed, tmp_path):
    directory = tmp_path / "pruned"
    hashes = set()
    for removed in (REMOVED, REMOVED[:-1]):
        shutil.rmtree(directory, ignore_errors=True)
        hashes.add(engine_config(write(random_llama(), removed, directory)).compute_hash())
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

    from finercut.serving.vllm_models import remove_sublayer

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
        remove_sublayer(block, "layers.0", kind, layout[kind], VllmConfig())
        assert torch.allclose(sum(block(*state)), sum(whole(*state)))


def known(directory):
    """What vLLM makes of a model's config, where it goes by the model's type and by its architecture's name."""
    from vllm.config import ModelConfig

    config = ModelConfig(model=str(directory), skip_tokenizer_init=True, dtype="float32")
    return {
        "type": (config.hf_config.model_type, config.hf_text_config.model_type),
        "architectures": (config.architecture, config.architectures, config.hf_config.architectures),
        "tokenizer": config.tokenizer_mode,
        "latent": config.use_mla,
        "head": config.get_head_size(),
        "keys": config.get_total_num_kv_heads(),
    }


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "deepseek_v3", "glm_moe_dsa"])
def test_what_vllm_knows_of_a_model_by_its_name_it_knows_of_the_pruned_one(model_type, tmp_path):
    from finercut.serving import vllm_plugin

    vllm_plugin.register()
    vllm_plugin.register()
    changes = (CASES | UNDECLARED | OTHERS)[model_type][1]
    model = random_model(model_type, **changes)
    model.save_pretrained(tmp_path / "whole model")
    if model_type not in CASES:
        note_layout(ModelDirectory(tmp_path / "whole model"))
    pruned = write(None, sublayers("0.mlp", "2.attention"), tmp_path / "pruned")
    expected = known(tmp_path / "whole model")
    assert expected["type"] == (model_type, model_type)
    assert known(pruned) == expected


def test_vllm_refuses_for_the_pruned_model_what_it_refuses_for_the_whole_one(tmp_path):
    from vllm import ModelRegistry
    from vllm.config import ModelConfig

    from finercut.serving import vllm_plugin

    vllm_plugin.register()
    random_model("gemma2", **CASES["gemma2"][1]).save_pretrained(tmp_path / "whole model")
    for directory in (tmp_path / "whole model", write(None, REMOVED, tmp_path / "pruned")):
        with pytest.raises(ValueError, match="does not support float16"):
            ModelConfig(model=str(directory), skip_tokenizer_init=True, dtype="float16")
    # Families that nobody declared are served where their base is.
    assert {"FinerCutStableLmForCausalLM", "FinerCutStarcoder2ForCausalLM"} <= ModelRegistry.get_supported_archs()


def test_vllm_makes_the_whole_models_tokens_of_what_it_knows_by_its_name(tiny_model, tiny_pruned):
    from vllm.tokenizers import get_tokenizer

    from finercut.model.tokenizer_files import check_sample, sample
    from finercut.serving import vllm_plugin

    vllm_plugin.register()
    expected = sample(get_tokenizer(str(tiny_model)))
    check_sample(expected, get_tokenizer(str(tiny_pruned)), "vLLM")
    assert len(expected) > 20
