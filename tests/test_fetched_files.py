"""Models as people have them: names of shards, dtypes, settings and files beside the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import multimodal_models
import pytest
import torch
from conftest import make_tokenizer, random_llama
from family_models import CASES, OTHERS, random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from finercut.checkpoint.card import card, inherited
from finercut.checkpoint.parity import check_parity
from finercut.checkpoint.prune import prune
from finercut.checkpoint.writing import differing_tensors, write_tuned
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load_pruned
from finercut.selection.selection import Chosen, Origin, Selection, given
from finercut.sources.corrections import settle, settle_dtype
from finercut.sources.models import fetch_model
from finercut.sources.settings import LocalModel

REMOVED = ["2.attention", "3.mlp"]


def saved(directory: Path, dtype: torch.dtype = torch.float32, *, tied: bool = True, **options) -> Path:
    random_llama(tie_word_embeddings=tied).to(dtype).save_pretrained(directory, **options)
    make_tokenizer().save_pretrained(directory)
    return directory


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def fetched(path: Path, directory: Path) -> Path:
    directory.mkdir()
    origin = fetch_model(LocalModel(kind="local", path=path), directory, directory.parent / "work")
    settle(directory, origin.source)
    return directory


def is_the_masked_whole(pruned: Path, model: Path) -> bool:
    windows = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(1))
    return check_parity(ModelDirectory(model), ModelDirectory(pruned), windows, 1e-3, torch.device("cpu")).passed


# Shards


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"-of-0", "-of-00"),  # DeepSeek: model-00001-of-000002.safetensors
        (r"^model-", "model.safetensors-"),  # Qwen3.5
        (r"^model-", "pytorch_model-"),
        (r"^model-(\d+)-of-\d+", r"part\1"),
    ],
)
def test_the_shards_are_those_that_the_index_names(tmp_path, pattern, name):
    whole = saved(tmp_path / "whole", max_shard_size="300KB")
    index = whole / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {key: re.sub(pattern, name, shard) for key, shard in content["weight_map"].items()}
    for shard in whole.glob("*.safetensors"):
        shard.rename(whole / re.sub(pattern, name, shard.name))
    index.write_text(json.dumps(content))
    for stranger in ("consolidated-00001-of-00001.safetensors", "consolidated.safetensors"):
        (whole / stranger).write_bytes(b"no weights of this model")
    model = ModelDirectory(fetched(whole, tmp_path / "model"))
    assert model.n_elements == sum(p.numel() for p in random_llama().parameters())
    assert {file.name for file in model.path.glob("*.safetensors")} == set(content["weight_map"].values())
    # The same weights to those who take the folder as it is.
    assert ModelDirectory(whole).weights_sha256 == model.weights_sha256


@pytest.mark.parametrize("named", ["evil.bin", "../other/model.safetensors", "absent.safetensors"])
def test_an_index_names_shards_only(tmp_path, named):
    whole = saved(tmp_path / "whole", max_shard_size="300KB")
    (whole / "evil.bin").write_bytes(b"x")
    index = whole / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = named
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"names '{re.escape(named)}', which is not a shard"):
        fetched(whole, tmp_path / "model")


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"type": "yarn", "factor": 4.0},
        {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "factor": 4.0},
    ],
)
def test_rotary_embeddings_scaled_as_published_configs_write_it(tmp_path, scaling):
    whole = saved(tmp_path / "whole")
    file = whole / "config.json"
    settings = json.loads(file.read_text())
    del settings["rope_parameters"]
    written = {"rope_theta": 500000.0, "rope_scaling": scaling | {"original_max_position_embeddings": 64}}
    file.write_text(json.dumps(settings | written))
    model = fetched(whole, tmp_path / "model")
    prune(model, REMOVED, None, tmp_path / "pruned")
    rope = load_pruned(tmp_path / "pruned").config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == (scaling.get("rope_type", scaling.get("type")), scaling["factor"])
    assert is_the_masked_whole(tmp_path / "pruned", model)


@pytest.mark.parametrize(("model_type", "changes"), [CASES["gpt_neox"], CASES["gpt2"]], ids=["gpt_neox", "gpt2"])
def test_masks_that_older_files_have_beside_the_weights_do_not_count(tmp_path, model_type, changes):
    made = random_model(model_type, **changes).to(torch.float16)
    made.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    prefix = "transformer.h.{}.attn" if model_type == "gpt2" else "gpt_neox.layers.{}.attention"
    for i in range(4):
        # As Pythia's in float16, where -1e9 is not finite; GPT-2's masks are floating-point numbers.
        tensors[f"{prefix.format(i)}.masked_bias"] = torch.tensor(float("-inf"), dtype=torch.float16)
        mask = torch.ones(1, 1, 512, 512, dtype=torch.float32 if model_type == "gpt2" else torch.bool)
        tensors[f"{prefix.format(i)}.bias"] = mask
    save_file(tensors, file, {"format": "pt"})
    model = ModelDirectory(fetched(tmp_path / "whole", tmp_path / "model"))
    assert model.n_elements == sum(p.numel() for p in made.parameters())
    assert model.dtype == "float16"


def test_numbers_that_are_not_finite_in_a_weight_are_damage(tmp_path):
    whole = saved(tmp_path / "whole")
    file = whole / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.weight in .* not finite: the weights are damaged"):
        fetched(whole, tmp_path / "model")


def test_experts_that_files_hold_together_are_written(tmp_path):
    model_type, changes = CASES["mixtral"]
    random_model(model_type, **changes).save_pretrained(tmp_path / "whole", save_original_format=False)
    make_tokenizer().save_pretrained(tmp_path / "whole")
    model = fetched(tmp_path / "whole", tmp_path / "model")
    assert any(name.endswith("experts.gate_up_proj") for name in ModelDirectory(model).tensors)
    prune(model, REMOVED, None, tmp_path / "pruned")
    assert is_the_masked_whole(tmp_path / "pruned", model)


# Dtypes


def test_dtypes_are_kept_where_files_leave_the_prefix_out(tmp_path):
    whole = saved(tmp_path / "whole", torch.bfloat16)
    file = whole / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    # The norms in float32, with numbers that bfloat16 has not.
    bare = {
        name.removeprefix("model."): 1 + torch.rand(value.shape, generator=generator) / 3 if "norm" in name else value
        for name, value in load_file(file).items()
    }
    save_file(bare, file, {"format": "pt"})
    model = fetched(whole, tmp_path / "model")
    prune(model, REMOVED, None, tmp_path / "pruned")
    stored = ModelDirectory(tmp_path / "pruned").tensors
    assert {stored[name].dtype for name in stored if "norm" in name} == {"F32"}
    assert {stored[name].dtype for name in stored if "norm" not in name} == {"BF16"}
    assert is_the_masked_whole(tmp_path / "pruned", model)


@pytest.mark.parametrize(("stored", "said"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")])
def test_the_stored_dtype_is_kept_whatever_the_config_says(tmp_path, tokens, stored, said):
    whole = saved(tmp_path / "whole", getattr(torch, stored))
    edit(whole / "config.json", dtype=said)
    report = prune(whole, REMOVED, None, tmp_path / "pruned")
    assert report.pruned_bytes < report.whole_bytes
    assert ModelDirectory(tmp_path / "pruned").dtype == stored
    pair = ModelDirectory(whole), ModelDirectory(tmp_path / "pruned")
    assert check_parity(*pair, tokens, 0.001, torch.device("cpu")).passed
    settle_dtype(ModelDirectory(whole))
    assert ModelDirectory(whole).settings["dtype"] == stored


def test_a_healed_checkpoint_keeps_the_dtype_of_every_tensor(tmp_path):
    whole = saved(tmp_path / "whole", torch.bfloat16)
    norms = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
    stored = load_file(whole / "model.safetensors")
    # A third is not among bfloat16's numbers.
    save_file(
        stored | {name: torch.full((128,), 1 / 3) for name in norms}, whole / "model.safetensors", {"format": "pt"}
    )
    prune(fetched(whole, tmp_path / "model"), REMOVED, None, tmp_path / "pruned")
    pruned = ModelDirectory(tmp_path / "pruned")
    changed = "model.layers.0.mlp.up_proj.weight"
    (tmp_path / "healed").mkdir()
    write_tuned(pruned, {norms[1]: torch.ones(128), changed: torch.zeros(192, 128)}, tmp_path / "healed")
    healed = ModelDirectory(tmp_path / "healed")
    assert {healed.tensors[name].dtype for name in norms} == {"F32"}
    assert differing_tensors(pruned, healed) == [norms[1], changed]


# Settings


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize("changes", [{"pad_token_id": -1}, {"temperature": 0.6, "top_p": 0.9, "max_length": 20}])
def test_settings_that_saving_refuses_are_pruned_as_loading_takes_them(tmp_path, has_file, changes):
    whole = saved(tmp_path / "whole")
    edit(whole / "config.json", **changes)
    if not has_file:
        (whole / "generation_config.json").unlink()
    settle(whole, "tiny")
    prune(whole, REMOVED, None, tmp_path / "pruned")
    expected = AutoModelForCausalLM.from_pretrained(whole)
    found = load_pruned(tmp_path / "pruned")
    assert found.generation_config.to_diff_dict() == expected.generation_config.to_diff_dict()
    assert found.config.pad_token_id == expected.config.pad_token_id


@pytest.mark.parametrize("is_fetched", [True, False])
def test_two_matrices_that_differ_stay_two_where_the_config_ties_them(tmp_path, tokens, is_fetched):
    whole = saved(tmp_path / "whole", tied=False)
    edit(whole / "config.json", tie_word_embeddings=True)
    source = ModelDirectory(fetched(whole, tmp_path / "model") if is_fetched else whole)
    assert source.settings["tie_word_embeddings"] is not is_fetched
    prune(source, REMOVED, None, tmp_path / "pruned")
    pruned = ModelDirectory(tmp_path / "pruned")
    assert check_parity(source, pruned, tokens, 0.001, torch.device("cpu")).passed
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= pruned.tensors.keys()


@pytest.mark.parametrize(("model_type", "top", "inner"), [("llava", False, True), ("qwen2_5_vl", True, False)])
def test_two_matrices_stay_two_whatever_files_call_them_and_whichever_config_ties_them(
    tmp_path, tokens, model_type, top, inner
):
    whole = multimodal_models.save(model_type, tmp_path / "whole")
    make_tokenizer().save_pretrained(whole)
    settings = json.loads((whole / "config.json").read_text())
    settings["text_config"]["tie_word_embeddings"] = inner
    edit(whole / "config.json", **settings | {"tie_word_embeddings": top})
    model = fetched(whole, tmp_path / "model")
    assert ModelDirectory(model).tensors == ModelDirectory(whole).tensors
    prune(ModelDirectory(model), REMOVED, None, tmp_path / "pruned")
    expected, found = (AutoModelForImageTextToText.from_pretrained(path) for path in (whole, tmp_path / "pruned"))
    assert torch.equal(found.get_output_embeddings().weight, expected.get_output_embeddings().weight)
    assert not torch.equal(found.get_output_embeddings().weight, found.get_input_embeddings().weight)
    assert is_the_masked_whole(tmp_path / "pruned", model)


def test_two_matrices_stay_two_where_files_leave_out_the_prefix(tmp_path):
    whole = saved(tmp_path / "whole", tied=False)
    stored = load_file(whole / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    save_file(bare, whole / "model.safetensors", {"format": "pt"})
    edit(whole / "config.json", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(fetched(whole, tmp_path / "model"))
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])


def test_a_model_that_is_stored_in_float64_is_run_as_its_config_says(tmp_path):
    whole = saved(tmp_path / "whole", torch.float64)
    edit(whole / "config.json", dtype="float32")
    prune(fetched(whole, tmp_path / "model"), REMOVED, None, tmp_path / "pruned")
    for path in (whole, tmp_path / "model", tmp_path / "pruned"):
        assert AutoModelForCausalLM.from_pretrained(path).dtype == torch.float32


def test_layers_that_predict_tokens_further_ahead_are_passed_over(tmp_path):
    model_type, changes = OTHERS["deepseek_v3"]
    random_model(model_type, **changes, num_nextn_predict_layers=1).save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole/model.safetensors"
    stored = load_file(file)
    ahead = {"model.layers.4.enorm.weight": torch.ones(64), "model.layers.4.mlp.gate.weight": torch.ones(4, 64)}
    save_file(stored | ahead, file, {"format": "pt"})
    model = fetched(tmp_path / "whole", tmp_path / "model")
    assert ModelDirectory(model).weights.keys() == stored.keys()
    save_file(stored | {"model.layers.5.enorm.weight": torch.ones(64)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.5\.enorm\.weight is not in the model"):
        fetched(tmp_path / "whole", tmp_path / "other")


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "300KB"}])
def test_a_tied_matrix_that_has_the_outputs_name_gets_the_embeddings(tmp_path, tokens, options):
    # As safetensors' save_model leaves it. transformers takes either, vLLM the embeddings alone.
    whole, embeddings = saved(tmp_path / "whole", **options), "model.embed_tokens.weight"
    for file in whole.glob("*.safetensors"):
        stored = load_file(file)
        if embeddings in stored:
            stored["lm_head.weight"] = stored.pop(embeddings)
        save_file(stored, file, {"format": "pt"})
    for index in whole.glob("*.index.json"):
        index.write_text(index.read_text().replace(embeddings, "lm_head.weight"))
    source = ModelDirectory(fetched(whole, tmp_path / "model"))
    assert "lm_head.weight" not in source.tensors
    assert torch.equal(source.tensor(embeddings), random_llama().model.embed_tokens.weight)
    prune(source, REMOVED, None, tmp_path / "pruned")
    assert check_parity(source, ModelDirectory(tmp_path / "pruned"), tokens, 0.001, torch.device("cpu")).passed


@pytest.mark.parametrize("said", [None, [], ["LlamaModel"], ["LlamaForSequenceClassification"], ["LlamaForCausalLM"]])
def test_a_config_names_a_class_that_writes_text(tmp_path, said):
    whole = saved(tmp_path / "whole")
    edit(whole / "config.json", architectures=said)
    assert ModelDirectory(fetched(whole, tmp_path / "model")).settings["architectures"] == ["LlamaForCausalLM"]


def test_what_config_json_says_of_a_run_is_left_out(tmp_path, tokens):
    whole = saved(tmp_path / "whole")
    of_a_run = {"return_dict": False, "output_hidden_states": True, "use_cache": False}
    of_a_run |= {"attn_implementation": "flash_attention_2", "quantization_config": None}
    edit(whole / "config.json", **of_a_run)
    source = ModelDirectory(fetched(whole, tmp_path / "model"))
    assert not of_a_run.keys() & source.settings.keys()
    prune(source, REMOVED, None, tmp_path / "pruned")
    assert check_parity(source, ModelDirectory(tmp_path / "pruned"), tokens, 0.001, torch.device("cpu")).passed


# Files beside the weights


def test_of_a_users_own_folder_no_other_weights_travel(tmp_path):
    whole = saved(tmp_path / "whole")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.pt", "model.Q4.gguf", "NOTICE"):
        (whole / name).write_text("{}")
    prune(whole, REMOVED, None, tmp_path / "pruned")
    found = {file.name for file in (tmp_path / "pruned").iterdir()}
    assert "NOTICE" in found
    assert not {name for name in found if name.endswith((".bin", ".bin.index.json", ".pt", ".gguf"))}


def test_what_belongs_to_the_model_travels_with_it(tmp_path):
    whole = saved(tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(whole)
    tokenizer.chat_template = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
    tokenizer.save_pretrained(whole)
    assert (whole / "additional_chat_templates" / "tool_use.jinja").is_file()
    (whole / "LICENSE.txt").write_text("Llama 3.2 Community License")
    for name in ("USE_POLICY.md", "THIRD_PARTY_NOTICES.txt", "MODEL_LICENSE", "license.py"):
        (whole / name).write_text("be good")
    (whole / "README.md").write_text(
        "---\nlicense: llama3.2\nbase_model: org/base\nlanguage: [en]\ntags: [theirs]\n---\n# Theirs\n"
    )
    prune(fetched(whole, tmp_path / "model"), REMOVED, None, tmp_path / "pruned")
    pruned = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    chat = [{"role": "user", "content": "x"}]
    assert pruned.apply_chat_template(chat, chat_template="tool_use", tokenize=False) == "Tx"
    assert pruned.apply_chat_template(chat, tokenize=False) == "Dx"
    assert (tmp_path / "pruned" / "LICENSE.txt").read_text() == "Llama 3.2 Community License"
    assert {"USE_POLICY.md", "THIRD_PARTY_NOTICES.txt", "MODEL_LICENSE"} <= {
        p.name for p in (tmp_path / "pruned").iterdir()
    }
    assert not (tmp_path / "pruned" / "license.py").exists()
    readme = tmp_path / "pruned" / "README.md"
    assert inherited(readme) == {"license": "llama3.2", "base_model": "org/base", "language": ["en"]}
    assert "Theirs" not in readme.read_text()


@pytest.mark.parametrize("text", [b"\xff\xfe", b"---\na: [\n---\n", b"---\n- a\n---\n", b"no front matter"])
def test_a_card_that_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    assert inherited(tmp_path / "README.md") == {}


@pytest.mark.parametrize(("revision", "named"), [("0" * 40, True), ("0" * 64, False)])
def test_a_card_names_repositories_of_the_hub_as_base_and_no_paths(revision, named):
    of = {"model_source": "models/mine", "model_revision": revision, "model_sha256": "", "n_blocks": 4}
    origin = Origin(**of, calibration_sha256="", held_out_sha256="", divergence="js")
    selection = given(["1.mlp"]).model_copy(update={"origin": origin})
    text = card(selection, {}, 8, "", own_code=False, auto="AutoModelForCausalLM", metadata={})
    assert ("base_model: models/mine" in text) == named


@pytest.mark.parametrize(
    ("method", "divergence", "said"),
    [
        ("greedy_per_parameters", "js", "the sublayers whose removal changed the output distribution least were taken"),
        ("greedy", "task", "the sublayers that `greedy` chose were taken"),
        ("random", "js", "the sublayers that `random` chose were taken"),
        (
            "greedy",
            "task",
            "negative log-likelihood of the answers of the task's examples: 0.2500 nats per token, 0.5000",
        ),
        ("greedy", "js", "js divergence from the whole model: 0.2500 on the calibration tokens"),
    ],
)
def test_a_card_says_what_chose_and_what_was_measured(method, divergence, said):
    of = {"model_source": "mine", "model_revision": "1", "model_sha256": "", "n_blocks": 4}
    origin = Origin(**of, calibration_sha256="", held_out_sha256="", divergence=divergence)
    removal = Chosen(candidate="1.mlp", divergence=0.25, held_out_divergence=0.5)
    selection = Selection(method=method, nested=True, removals=[removal], left=[], origin=origin)
    text = card(selection, {}, 8, "", own_code=False, auto="AutoModelForCausalLM", metadata={})
    assert said in " ".join(text.split())


def test_an_adapter_in_the_folder_is_refused(tmp_path):
    whole = saved(tmp_path / "whole")
    (whole / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has an adapter \(adapter_config.json\).*merge it"):
        fetched(whole, tmp_path / "model")
