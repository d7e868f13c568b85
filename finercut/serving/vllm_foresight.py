"""The process in which vLLM answers `finercut.serving.foresight.ask`: its argument is the question, it prints JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from finercut.serving.settings import EngineSettings
from finercut.serving.vllm_engine import shortened
from finercut.serving.vllm_process import arguments, tokenizer_sample


def _main() -> None:
    # Garbage may stay for the seconds that this process lives: collections would look through all that vLLM imports.
    gc.disable()
    from finercut.model.tokenizer_files import present

    # Libraries print to the standard output: keep it to the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
    if "quantization_config" in asked:
        with _one_rank():
            print(json.dumps(_scheme_refusal(**asked)), file=answers, flush=True)
        return
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
        # Users serve it with what lies around it.
        whole = arguments(directory, settings) | {"language_model_only": False}
        config = EngineArgs(**whole).create_engine_config()
        if config.parallel_config.distributed_executor_backend == "mp":
            _check_shared_memory()
        with (
            set_current_vllm_config(config),
            set_default_torch_dtype(config.model_config.dtype),
            torch.device("meta"),
        ):
            initialize_model(config)
            _check_attention(config, settings)
    except Exception as error:
        # vLLM refuses by errors of every class, also by assertions.
        said = _one_line(error)
        # What cannot be made without memory may be made with it.
        return None if " meta " in f" {said} " else said
    return None


def _check_shared_memory() -> None:
    """Containers have 64 MiB unless somebody asks for more.

    Raises:
        RuntimeError: /dev/shm has no room for what an engine's processes talk through.
    """
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    MessageQueue(1, 1)  # as a worker makes it; of the two that an engine has, the larger one


def _check_attention(config: Any, settings: EngineSettings) -> None:
    """What an engine finds out after it has loaded all weights.

    Args:
        config: vLLM's, with which a model was made.

    Raises:
        ValueError: vLLM has no kernel for the heads, or a sequence does not fit the KV cache.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform
    from vllm.v1.core.kv_cache_utils import estimate_max_model_len, is_kv_cache_spec_uniform, max_memory_usage_bytes

    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    attentions = {name: layer for name, layer in layers.items() if isinstance(layer, Attention)}
    for layer in attentions.values():
        backend = layer.get_attn_backend()
        if not backend.supports_head_size(layer.head_size):
            raise ValueError(
                f"{backend.get_name()} has no kernel for heads of size {layer.head_size}, only for those of "
                f"{', '.join(map(str, backend.get_supported_head_sizes()))}"
            )
    if len(attentions) < len(layers):
        return  # recurrent states and latent attention, whose caches only an engine lays out
    current_platform.update_block_size_for_backend(config)
    caches = {
        name: cache
        for name, layer in attentions.items()
        if layer.kv_sharing_target_layer_name is None and (cache := layer.get_kv_cache_spec(config))
    }
    # Here is one rank of them all.
    n_bytes = int(settings.kv_cache_gib * 2**30) * settings.tensor_parallel_size * settings.pipeline_parallel_size
    if is_kv_cache_spec_uniform(caches):
        # vLLM keeps a block of tokens for itself.
        n_bytes -= sum(cache.page_size_bytes for cache in caches.values())
    if (needed := max_memory_usage_bytes(config, caches.values())) > n_bytes:
        raise ValueError(
            f"a sequence of max_model_len {settings.max_model_len} takes {needed / 2**30:.3g} GiB of KV cache, and "
            f"kv_cache_gib {settings.kv_cache_gib:.3g} holds {max(estimate_max_model_len(config, caches, n_bytes), 0)} "
            "tokens: set one higher or the other lower"
        )


# Of a matrix that is multiplied to see whether vLLM does; divided by every group size that models take.
_SIZE = 512
_LARGEST_ERROR = 0.01
"""Of a product, as a share of the largest there."""


def _scheme_refusal(quantization_config: dict[str, Any], weight_bits: int, dtype: str) -> str | None:
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    torch.manual_seed(0)
    try:
        with set_default_torch_dtype(getattr(torch, dtype)), torch.device(current_platform.device_type):
            quantisation = CompressedTensorsConfig.from_config(quantization_config)
            matrix = ReplicatedLinear(
                _SIZE, _SIZE, bias=False, quant_config=quantisation, prefix="model.layers.0.mlp.up"
            )
            weight = _fill(matrix, 2 ** (weight_bits - 1) - 1)
            # Whole numbers, of which every token has the largest: quantised inputs are these very numbers.
            floating = hasattr(matrix, "weight") and matrix.weight.is_floating_point()
            largest = 448 if floating else 127
            inputs = torch.randint(-8, 9, (4, _SIZE)).to(matrix.weight_scale.dtype)
            inputs[:, ::2] = torch.where(inputs[:, ::2] < 0, -largest, largest)
            expected = inputs.double() @ weight.double().T
            matrix.quant_method.process_weights_after_loading(matrix)
            found = matrix(inputs)[0].double()
    except Exception as error:
        # Kernels that this build or this device lacks are errors of every class.
        return _one_line(error)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= _LARGEST_ERROR:
        return f"what it multiplies is wrong by {error:.0%}"
    return None


def _fill(matrix: torch.nn.Module, largest: int) -> torch.Tensor:
    """Give a matrix of vLLM's numbers as a checkpoint stores them.

    Args:
        largest: of the 8-bit numbers.

    Returns:
        (outputs, inputs) what they stand for.
    """
    scale = matrix.weight_scale.data
    scale.copy_(torch.rand_like(scale) / 64 + 1 / 64)
    if hasattr(matrix, "weight_packed"):
        packed = matrix.weight_packed.data
        numbers = torch.randint(0, 16, (_SIZE, _SIZE // 8, 8), dtype=torch.int64)
        whole = (numbers << 4 * torch.arange(8)).sum(-1)
        packed.copy_(torch.where(whole < 2**31, whole, whole - 2**32))
        numbers = numbers.reshape(_SIZE, _SIZE) - 8
    else:
        numbers = torch.randint(-largest, largest + 1, (_SIZE, _SIZE)).float().to(matrix.weight.dtype)
        matrix.weight.data.copy_(numbers)
    spread = scale.double().reshape(_SIZE, -1)
    return (numbers.double() * spread.repeat_interleave(_SIZE // spread.shape[1], 1)).float()


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
    elif isinstance(error, ModuleNotFoundError):
        said = f"its model imports {error.name}, which is not installed here"
        if error.name == "torchvision":
            said += f": add the build that goes with torch {torch.__version__}, see docs/families.md"
    else:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return shortened(" ".join(said.partition(" Supported architectures:")[0].split()))


if __name__ == "__main__":
    _main()
