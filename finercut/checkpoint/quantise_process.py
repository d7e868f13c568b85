"""The process in which llm-compressor works, in an environment of its own: its argument is the task, a line of JSON.

The task is `model`, the directory of the checkpoint; `result`, the directory to write; `scheme` and `ignore`, of
compressed-tensors; `windows`, a safetensors file with the token ids that gptq looks at, or null for rtn.
"""

from __future__ import annotations

import json
import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import GenerationConfig

from finercut.model.directory import ModelDirectory
from finercut.model.loading import load_pruned, load_whole


def _main() -> None:
    task = json.loads(sys.argv[1])
    directory = ModelDirectory(task["model"])
    model = (load_pruned if directory.is_pruned else load_whole)(directory)
    groups = {"config_groups": {"group_0": task["scheme"]}, "ignore": task["ignore"]}
    if task["windows"] is None:
        oneshot(model=model, recipe=QuantizationModifier(**groups))
    else:
        windows = load_file(task["windows"])["windows"]
        oneshot(
            model=model,
            recipe=GPTQModifier(**groups),
            dataset=torch.utils.data.DataLoader([{"input_ids": window} for window in windows]),
            num_calibration_samples=len(windows),
        )
    model.generation_config = GenerationConfig()  # saving refuses some that loading takes; the parent's file is copied
    model.save_pretrained(task["result"], save_compressed=True)


if __name__ == "__main__":
    _main()
