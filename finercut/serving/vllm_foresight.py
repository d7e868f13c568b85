"""The process in which vLLM answers `finercut.serving.foresight.ask`: the question in, the answer out, both JSON."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finercut.serving.settings import EngineSettings
from finercut.serving.vllm_engine import shortened
from finercut.serving.vllm_process import arguments, load_class, tokenizer_sample


def _main() -> None:
    # Garbage may stay for the seconds that this process lives: collections would look through all that vLLM imports.
    gc.disable()
    from finercut.model.directory import ModelDirectory

    # Libraries print to the standard output: keep it to the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    if "quantization_config" in asked:
        with _one_rank():
            print(json.dumps(_scheme_refusal(**asked)), file=answers, flush=True)
        return
    engines = [EngineSettings.model_validate(settings) for settings in asked["engines"]]
    with _one_rank():
        found = [
            {
                "refusals": _refusals(model, engines),
                "tokenizer": tokenizer_sample(str(directory)) if directory.has_tokenizer else None,
            }
            for model in asked["models"]
            for directory in [ModelDirectory(model["directory"])]
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


def _refusals(model: dict[str, Any], engines: Sequence[EngineSettings]) -> list[str | None]:
    if first := _refusal(model, engines[0], load=True):
        return [first] * len(engines)
    return [None, *(_refusal(model, settings, load=False) for settings in engines[1:])]


def _refusal(asked: dict[str, Any], settings: EngineSettings, load: bool) -> str | None:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    try:
        load_class(asked["directory"])
        # Users serve it with what lies around it.
        whole = arguments(asked["directory"], settings) | {"language_model_only": False}
        config = EngineArgs(**whole).create_engine_config()
        if config.parallel_config.distributed_executor_backend == "mp":
            _check_shared_memory()
        with (
            set_current_vllm_config(config),
            set_default_torch_dtype(config.model_config.dtype),
            _WithoutWeights(),
        ):
            model = initialize_model(config)
            _check_attention(config, settings)
            if load:
                _check_weights(model, config, asked["weights"], asked["computing"])
    except Exception as error:
        # vLLM refuses by errors of every class, also by assertions.
        said = _one_line(error)
        # What cannot be made without memory may be made with it.
        return None if re.search(r"(?<![\w/-])meta(?![\w/-])", said, re.IGNORECASE) else said  # and no path
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
        ValueError: vLLM has no kernel for the heads, a scan or a delta net, or a sequence does not fit the KV cache.
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
    if current_platform.is_cpu():
        _check_mixers_on_cpu(list(layers.values()), config.model_config.dtype)
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


def _check_mixers_on_cpu(layers: Sequence[Any], dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.mamba.gdn.base import GatedDeltaNetAttention
    from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer

    for layer in layers:
        if isinstance(layer, MambaMixer) and not hasattr(torch.ops._C, "selective_scan_fwd"):
            raise ValueError("its build for CPUs has no kernel for the scan of Mamba's state space model")
        if isinstance(layer, GatedDeltaNetAttention) and dtype != torch.bfloat16:
            raise ValueError("its build for CPUs computes gated delta nets in bfloat16 alone")


class _WithoutWeights(TorchFunctionMode):
    """Tensors that are made without values take no memory. Others have theirs: models ask for them as they are made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.empty_like, torch.empty_strided) and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


class _Sources(TorchDispatchMode):
    """Follows stored tensors to the memory that they end up in, whatever is made of them on the way."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, set[str]] = {}
        self._kept: list[torch.Tensor] = []  # the address of memory that is let go may become another's

    def begin(self, name: str, tensor: torch.Tensor) -> None:
        self._add({name}, tensor)

    def of(self, tensor: torch.Tensor) -> set[str]:
        """The names of the stored tensors that something in its memory comes from."""
        return self._names.get(tensor.untyped_storage()._cdata, set())

    def _add(self, names: set[str], tensor: torch.Tensor) -> None:
        self._names.setdefault(tensor.untyped_storage()._cdata, set()).update(names)
        self._kept.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and self.of(args[1]):
            # There is nothing to be copied, and the other may be in memory.
            result = args[0]
            args[1].expand_as(result)
        else:
            result = func(*args, **kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        if names := set[str]().union(*map(self.of, given)):
            for tensor in tree_leaves(result):
                if torch.is_tensor(tensor):
                    self._add(names, tensor)
        return result


def _check_weights(
    model: torch.nn.Module, config: Any, shapes: Mapping[str, Sequence[int]], computing: Collection[str]
) -> None:
    """Load weights without values into a model of vLLM's: it passes over some, and leaves others unset, in silence.

    Args:
        config: vLLM's, with which the model was made.
        shapes: of all stored weights.
        computing: what must be used where it is stored.

    Raises:
        ValueError: vLLM does not take a weight, passes over one of `computing`, or has one that is not stored.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    sources, reached = _Sources(), ""

    def stored(*_: Any) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal reached
        for name, shape in shapes.items():
            reached = f"{name} of shape {tuple(shape)}"
            tensor = torch.empty(shape)
            sources.begin(name, tensor)
            yield name, tensor
        reached = "the weights"

    loader = DefaultModelLoader(config.load_config)
    loader.get_all_weights = stored  # instead of those in files
    try:
        with sources:
            loader.load_weights(model, config.model_config)
    except Exception as error:
        # vLLM's loaders refuse by errors of every class, also by assertions.
        raise ValueError(f"its model does not take {reached}: {_one_line(error)}") from error
    used = set[str]().union(*map(sources.of, [*model.parameters(), *model.buffers()]))
    if unused := sorted(set(computing) & shapes.keys() - used):
        raise ValueError(f"its model makes no use of {_some(unused)}, which transformers computes with")
    if unset := sorted(name for name, it in model.named_parameters() if it.numel() and not sources.of(it)):
        raise ValueError(f"its model has {_some(unset)}, which the checkpoint has not")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" ({len(names)} in all)" if len(names) > 3 else "")


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
    for list_follows in (" Supported architectures:", ". The available parameters belonging"):
        said = said.partition(list_follows)[0]
    return shortened(" ".join(said.split()))


if __name__ == "__main__":
    _main()
