"""Entry point that makes vLLM know pruned checkpoints. vLLM calls it in every process it starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
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
    _take_for_whole()


def _take_for_whole() -> None:
    """Have vLLM take a pruned model for the whole one wherever it goes by a model's type or by its architecture's name.

    There are dozens of such places: latent attention (DeepSeek), the format of chats and adapters of experts (gpt-oss),
    refusals of float16, whether the tokens of an image see each other. Configs keep their classes; where vLLM looks up
    the class of a model, it finds that of the pruned one.
    """
    from vllm.model_executor.models.registry import _ModelRegistry
    from vllm.transformers_utils.config import HFConfigParser
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    from finercut.model.modeling_finercut import PREFIX, InnerConfig, PrunedConfig, own_settings

    def parse(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        settings, config = original(*args, **kwargs)
        if isinstance(config, PrunedConfig):
            config.model_type = type(config).model_type.removeprefix(f"{PREFIX.lower()}_")
            config.architectures = [name.removeprefix(PREFIX) for name in config.architectures or ()]
        return settings, config

    def look_up(original: Callable[..., Any], registry: Any, architectures: Any, model_config: Any) -> Any:
        names = [architectures] if isinstance(architectures, str) else architectures
        # One inside another is built as the whole one, by the class around it.
        if isinstance(model_config.hf_config, PrunedConfig) and not isinstance(model_config.hf_config, InnerConfig):
            names = [PREFIX + name.removeprefix(PREFIX) for name in names]
        found, name = original(registry, names, model_config)
        return found, name.removeprefix(PREFIX)

    def by_layer(original: Callable[..., Any], convertor: Any) -> Any:
        # vLLM refuses configs of latent attention that differ from block to block: only where the whole one's do.
        language = convertor.hf_text_config
        return None if isinstance(language, PrunedConfig) and not own_settings(language) else original(convertor)

    _replace(HFConfigParser, "parse", parse)
    _replace(_ModelRegistry, "inspect_model_cls", look_up)
    _replace(_ModelRegistry, "resolve_model_cls", look_up)
    _replace(ModelArchConfigConvertorBase, "get_per_layer_hf_configs", by_layer)


def _replace(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    """Have `replacement` called with a method and the method's arguments; not again where it is."""
    method = getattr(owner, name)
    if getattr(method, "replaced_by", None) == __name__:
        return

    @wraps(method)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(method, *args, **kwargs)

    replaced.replaced_by = __name__
    setattr(owner, name, replaced)
