"""The process in which vLLM answers `finercut.serving.foresight.ask`: its argument is the question, it prints JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from finercut.model.tokenizer_files import present
from finercut.serving.settings import EngineSettings
from finercut.serving.vllm_engine import shortened
from finercut.serving.vllm_process import arguments, tokenizer_sample


def _main() -> None:
    # Libraries print to the standard output: keep it to the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
    engines = [EngineSettings.model_validate(settings) for settings in asked["engines"]]
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    with _one_rank():
        found = [
            {
                "refusals": [_refusal(model, settings) for settings in engines],
                "tokenizer": tokenizer_sample(model) if present(Path(model)) else None,
            }
            for model in asked["models"]
        ]
    print(json.dumps(found), file=answers, flush=True)


@contextmanager
def _one_rank() -> Iterator[None]:
    """The groups of processes that vLLM's layers look themselves up in, with this process alone."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        yield


def _refusal(directory: str, settings: EngineSettings) -> str | None:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    try:
        _load_class(directory)
        config = EngineArgs(**arguments(directory, settings)).create_engine_config()
        with (
            set_current_vllm_config(config),
            set_default_torch_dtype(config.model_config.dtype),
            torch.device("meta"),
        ):
            initialize_model(config)
    except Exception as error:
        # vLLM refuses by errors of every class, also by assertions.
        said = _one_line(error)
        # What cannot be made without memory may be made with it.
        return None if " meta " in f" {said} " else said
    return None


def _load_class(directory: str) -> None:
    """Give vLLM the model's class: by its name alone it would look at it in one more process, which imports vLLM."""
    from vllm import ModelRegistry

    for name in json.loads((Path(directory) / "config.json").read_text()).get("architectures") or []:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def _one_line(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
    elif isinstance(error, AssertionError) and not error.args:
        # It says nothing itself; the line that failed does.
        said = f"AssertionError: {traceback.extract_tb(error.__traceback__)[-1].line}"
    else:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return shortened(" ".join(said.partition(" Supported architectures:")[0].split()))


if __name__ == "__main__":
    _main()
