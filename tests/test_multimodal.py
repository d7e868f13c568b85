"""Language models inside others, with an image and without, against the masked whole model."""

import json

import pytest
import torch
from family_models import N_BLOCKS, run_without_finercut
from multimodal_models import MODELS, SIDE, save, with_image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from finercut.checkpoint.writing import write_pruned
from finercut.model import modeling_finercut
from finercut.model.costs import costs_of
from finercut.model.directory import ModelDirectory
from finercut.model.families import FAMILIES, LAYOUT_KEY, base_architecture, check_supported, layout_of
from finercut.model.layouts import note_layout
from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.selection.greedy import search
from finercut.sources import files
from finercut.sublayers import parse

TOLERANCE = 2e-5  # of logits whose spread is about 1
REMOVED = [s for name in ("0.attention", "1.mlp", "3.block") for s in parse(name).sublayers]
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module", params=MODELS)
def whole(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("multimodal") / "whole"
    save(request.param, directory)
    return load_whole(note_layout(ModelDirectory(directory)), torch.float32)


@pytest.fixture(scope="module")
def pruned(whole, tmp_path_factory):
    directory = tmp_path_factory.mktemp("multimodal") / "pruned"
    write_pruned(whole.config.name_or_path, REMOVED, directory, {}, "")
    return load_pruned(directory, torch.float32)


@torch.no_grad()
def test_with_an_image_and_on_text_alone_the_pruned_model_is_the_masked_whole_one(whole, pruned, tokens):
    prompt, text = with_image(whole.config.model_type), {"input_ids": tokens[:2]}
    for inputs in (prompt, text):
        with masked(whole, REMOVED):
            expected, continued = whole(**inputs).logits, whole.generate(**inputs, **SETTINGS)
        found = pruned(**inputs).logits
        assert (found - expected).abs().max() <= TOLERANCE
        assert (found - whole(**inputs).logits).abs().max() > 0.1
        assert torch.equal(pruned.generate(**inputs, **SETTINGS), continued)
    other = prompt | {"pixel_values": prompt["pixel_values"] + 1}
    assert (pruned(**other).logits - pruned(**prompt).logits).abs().max() > 0.1
    cache = pruned(**prompt, use_cache=True).past_key_values
    assert len(cache.layers) == N_BLOCKS - 2
    assert cache.get_seq_length() == prompt["input_ids"].shape[1]


@torch.no_grad()
def test_the_search_on_text_gives_the_divergences_of_masking(whole, tokens):
    tokens = tokens[:2]
    logits = whole(tokens).logits.log_softmax(-1)
    (removal,) = search(whole, tokens, tokens, n_removals=1, divergence="kl", mode="brute")
    expected = {}
    for sublayer in layout_of(whole.config).sublayers(N_BLOCKS):
        with masked(whole, [sublayer]):
            found = whole(tokens).logits.log_softmax(-1)
        expected[str(sublayer)] = (logits.exp() * (logits - found)).sum(-1).mean().item()
    assert removal.values == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_what_lies_around_the_language_model_stays_as_it_was(whole, pruned):
    source, directory = (ModelDirectory(model.config.name_or_path) for model in (whole, pruned))
    before, left = (load_file(of.path / "model.safetensors") for of in (source, directory))
    assert all(torch.equal(before[name], tensor) for name, tensor in left.items())
    gone, costs = before.keys() - left.keys(), costs_of(source)
    assert gone
    assert all(".layers." in name and "vision" not in name and "visual" not in name for name in gone)
    assert sum(before[name].numel() for name in gone) == costs["parameters"].of(REMOVED)
    assert costs["parameters"].whole == sum(p.numel() for p in whole.parameters())
    # Two key and value heads of 32 numbers in float32, for each attention.
    assert costs["kv_cache"].whole == N_BLOCKS * 2 * 2 * 32 * 4
    settings = directory.settings
    for name, value in source.settings.items():
        if name not in ("architectures", "model_type", "text_config", LAYOUT_KEY):
            assert settings[name] == value, name
    inner = dict(settings["text_config"])
    skipped = {"0": ["attention"], "1": ["mlp"], "3": ["attention", "mlp"]}
    assert inner.pop("per_layer_config") == {block: {"skip": kinds} for block, kinds in skipped.items()}
    assert inner == source.settings["text_config"]
    assert directory.removed == sorted(REMOVED)


@torch.no_grad()
def test_it_loads_with_the_classes_of_the_whole_model_and_saves_the_same(whole, pruned, tokens, tmp_path):
    directory = pruned.config.name_or_path
    name = f"FinerCut{type(whole).__name__}"
    assert pruned.config.architectures == [name]
    own = getattr(modeling_finercut, name)
    pruned.save_pretrained(tmp_path)
    for auto, of in ((AutoModelForImageTextToText, directory), (AutoModelForCausalLM, directory), (own, tmp_path)):
        loaded = auto.from_pretrained(of)
        assert type(loaded) is own
        assert isinstance(loaded, type(whole))
        loaded.set_attn_implementation(pruned.config._attn_implementation)
        assert torch.equal(loaded(tokens[:1]).logits, pruned(tokens[:1]).logits)
    assert without_dtypes_of_parts(tmp_path) == without_dtypes_of_parts(directory)


def without_dtypes_of_parts(directory):
    """The settings in config.json; transformers adds these when it has loaded the model."""
    settings = ModelDirectory(directory).settings
    return {
        name: {k: v for k, v in value.items() if k != "dtype"} if isinstance(value, dict) else value
        for name, value in settings.items()
    }


# Runs where finercut cannot be imported.
WITHOUT_FINERCUT = """
import sys
sys.modules["finercut"] = None
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
inputs = torch.load(sys.argv[1])
for directory in map(Path, sys.argv[2:]):
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, attn_implementation="eager")
    with torch.no_grad():
        torch.save(model(**inputs[directory.name]).logits, directory / "logits.pt")
text = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
print(type(text).__name__)
"""


@torch.no_grad()
def test_without_finercut_they_load_by_their_own_file(tmp_path):
    names = list(MODELS)[:3]
    directories = [tmp_path / name for name in names]
    for name, directory in zip(names, directories, strict=True):
        write_pruned(save(name, tmp_path / f"whole {name}"), REMOVED, directory, {}, "")
    inputs = {name: with_image(name) for name in names}
    assert run_without_finercut(WITHOUT_FINERCUT, tmp_path, inputs, directories).endswith("ForConditionalGeneration\n")
    for directory in directories:
        model = load_pruned(directory, torch.float32)
        model.set_attn_implementation("eager")
        assert torch.equal(torch.load(directory / "logits.pt"), model(**inputs[directory.name]).logits), directory.name


def test_the_processor_of_the_pruned_model_is_the_whole_ones(tokenizer, tmp_path):
    from transformers import CLIPImageProcessor, LlavaProcessor

    source, directory = save("llava", tmp_path / "whole"), tmp_path / "pruned"
    size = {"height": SIDE, "width": SIDE}
    pixels = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "image_token": "<image>"}
    own = LlavaProcessor(pixels, tokenizer, **settings)
    own.save_pretrained(source)
    taken = files.choose([p.name for p in source.iterdir()], "here", False, source / "model.safetensors.index.json")
    assert "processor_config.json" in taken
    # Where no file names its class, transformers goes by the model's type.
    for file in source.glob("*.json"):
        settings = json.loads(file.read_text())
        if settings.pop("processor_class", None):
            file.write_text(json.dumps(settings))
    write_pruned(source, REMOVED, directory, {}, "")
    image = torch.arange(3 * SIDE * SIDE, dtype=torch.uint8).reshape(3, SIDE, SIDE).numpy()
    given = {"text": "<image> The river", "images": image, "return_tensors": "pt"}
    found, expected = (AutoProcessor.from_pretrained(of) for of in (directory, source))
    assert type(found) is LlavaProcessor
    assert all(torch.equal(found(**given)[name], value) for name, value in expected(**given).items())


def config_of(model_type, **changes):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**changes)


def test_a_language_model_that_attends_to_images_in_blocks_of_their_own_is_refused(tmp_path):
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 16, "patch_size": 4, "max_num_tiles": 1, "vision_output_dim": 64}
    vision |= {"supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]}
    MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot prune a mllama model: of its 4 blocks text alone runs 3"):
        load_whole(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("florence2", "it is an encoder and a decoder"),
        ("shieldgemma2", "its class in transformers is gemma3's"),
        ("siglip", "and transformers has no class of it that writes text"),
    ],
)
def test_others_are_refused_before_anything_is_loaded(model_type, said):
    with pytest.raises(ValueError, match=f"cannot prune a {model_type} model: .*{said}"):
        check_supported(config_of(model_type))


def test_what_a_declared_family_says_holds_inside(whole):
    language = whole.config.get_text_config()
    if language.model_type in FAMILIES:
        layout = layout_of(whole.config)
        assert layout.attention == layout_of(language).attention
        assert layout.blocks.endswith(".layers")
    assert base_architecture(whole.config) == type(whole).__name__
