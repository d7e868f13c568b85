"""Tiny random models whose language model lies inside another with vision around it, and inputs with an image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer
from family_models import N_BLOCKS, settings
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_cases import HEADS

IMAGE, VIDEO, START, END = 390, 391, 392, 393
SIDE = 16
"""Pixels of an image, in patches of 4."""

WIDTH = {"hidden_size": HEADS["hidden_size"]}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": N_BLOCKS,  # as many as the language model has
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_QWEN_VISION = {
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "intermediate_size": 48,
    "out_hidden_size": 128,
}
_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}

# By type: its config, and how many tokens an image is.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "llava": (
        {
            "text_config": {"model_type": "llama", **settings("llama", **WIDTH)},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "projection_dim": 32},
            "image_token_index": IMAGE,
            "image_seq_length": 16,
        },
        16,
    ),
    "gemma3": (
        {
            "text_config": settings(
                "gemma3_text",
                **HEADS,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"] * 2,
                tie_word_embeddings=True,
            ),
            "vision_config": {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
            "mm_tokens_per_image": 4,
        },
        4,
    ),
    "qwen2_5_vl": (
        {
            "text_config": settings("qwen2_5_vl_text", rope_parameters=_ROPE, **WIDTH),
            "vision_config": {
                "depth": 2,
                "hidden_size": 64,
                **_QWEN_VISION,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **_QWEN,
        },
        4,
    ),
    "qwen3_vl": (
        {
            "text_config": settings("qwen3_vl_text", rope_parameters=_ROPE | {"mrope_interleaved": True}, **HEADS),
            # Features of the image are added to the stream between blocks, too.
            "vision_config": {
                "depth": 3,
                "hidden_size": 64,
                **_QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            **_QWEN,
        },
        4,
    ),
    "smolvlm": (
        {
            "text_config": {"model_type": "llama", **settings("llama", **WIDTH)},
            "vision_config": _VISION,
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": 2,
        },
        4,
    ),
}
# Its parts are SmolVLM's; vLLM and its processor of images do without torchvision.
MODELS["idefics3"] = MODELS["smolvlm"]


def random_wrapper(model_type: str) -> Any:
    """A fresh random model of 4 blocks, norms and biases random too; the same one for the same type."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type](**MODELS[model_type][0])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.15)
    return model


def save(model_type: str, directory: Path) -> Path:
    """Write `random_wrapper`, with the names that weights have in published checkpoints; returns the directory."""
    random_wrapper(model_type).save_pretrained(directory)
    file = directory / "model.safetensors"
    published = {re.sub(r"vision_tower\.", "vision_tower.vision_model.", n): t for n, t in load_file(file).items()}
    save_file(published, file, {"format": "pt"})
    return directory


def with_image(model_type: str) -> dict[str, Tensor]:
    """A prompt of text, an image and text again, as the type's processor would make it."""
    generator = torch.Generator().manual_seed(2)
    before, after = torch.randint(3, 380, (2, 1, 6), generator=generator)
    image = torch.full((1, MODELS[model_type][1]), IMAGE)
    ids = torch.cat([before, torch.tensor([[START]]), image, torch.tensor([[END]]), after], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    if model_type.startswith("qwen"):
        # 16 patches of 2 frames x 3 colours x 4 x 4 pixels.
        patches = torch.randn(16, 2 * 3 * 4 * 4, generator=generator)
        return inputs | {
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (ids == IMAGE).long(),
        }
    if model_type == "gemma3":
        return inputs | {"pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    return inputs | {"pixel_values": pixels[None] if model_type in ("smolvlm", "idefics3") else pixels}


def add_processor(directory: Path) -> None:
    """Give an Idefics3 a tokenizer, and a processor of images of SIDE pixels."""
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    tokenizer = make_tokenizer(IMAGE)
    # In the order of their ids.
    names = ["<image>", "<global-img>", "<fake_token_around_image>", "<end_of_utterance>"]
    tokenizer.add_tokens(names, special_tokens=True)
    side = {"longest_edge": SIDE}
    pixels = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    Idefics3Processor(pixels, tokenizer, image_seq_len=MODELS["idefics3"][1]).save_pretrained(directory)


def picture() -> Any:
    """The same random image each time, as PIL has it."""
    from PIL import Image

    pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


TEXT_AND_PICTURE = "The river <image> rises in the north."
"""What the processor is given with `picture`."""
