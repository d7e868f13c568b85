"""Entry point that makes vLLM know pruned checkpoints. vLLM calls it in every process it starts."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any


def register() -> None:
    """Register the configs with transformers and the model classes with vLLM. May be called again.

    Model classes go by name: vLLM imports them when it serves one, and not before, so that CUDA is left alone.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    from vllm import ModelRegistry

    from finercut.model import registration
    from finercut.model.modeling_finercut import PREFIX

    registration.register_configs()
    served = ModelRegistry.get_supported_archs()
    names = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values())
    for base in sorted({name for name in names if isinstance(name, str)}):
        name = PREFIX + base
        if base in served and name not in served and not base.startswith(PREFIX):
            ModelRegistry.register_model(name, f"finercut.serving.vllm_models:{name}")
    _read_as_whole(sorted(name for name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES if not name.startswith("finercut_")))
    for table, prefix in _by_name():
        for name in [name for name in table if not name.startswith(prefix)]:
            table.setdefault(prefix + name, table[name])


def _read_as_whole(model_types: Iterable[str]) -> None:
    """Have vLLM read the configs of pruned models by the type of the whole one: it knows by that type whether the
    tokens of an image see each other."""
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    table = convertors.MODEL_ARCH_CONFIG_CONVERTORS
    for model_type in model_types:
        whole = table.get(model_type, convertors.ModelArchConfigConvertorBase)
        table.setdefault(f"finercut_{model_type}", partial(_convertor, whole, model_type))


def _convertor(whole: type, model_type: str, hf_config: Any, hf_text_config: Any, **settings: Any) -> Any:
    if hf_text_config is not hf_config:
        hf_config = copy.copy(hf_config)
        hf_config.model_type = model_type
    return whole(hf_config, hf_text_config, **settings)


def _by_name() -> list[tuple[dict[str, Any], str]]:
    """What vLLM knows of models by their type or architecture, and what those of pruned ones begin with.

    That is refusals of float16, settings that an architecture needs, and chat templates of those without one.
    """
    from vllm.config import model
    from vllm.model_executor.models import config
    from vllm.transformers_utils.chat_templates import registry

    from finercut.model.modeling_finercut import PREFIX

    model_type = f"{PREFIX.lower()}_"
    # vLLM's own, some of them private: a version without one of them has nothing to be told.
    return [
        (getattr(model, "_FLOAT16_NOT_SUPPORTED_MODELS", {}), model_type),
        (getattr(registry, "_MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK", {}), model_type),
        (config.MODELS_CONFIG_MAP, PREFIX),
    ]
