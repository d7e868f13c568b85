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

    There are dozens of such places: latent attention (DeepSeek), the format of chats (gpt-oss, DeepSeek-V3.2), refusals
    of float16, whether the tokens of an image see each other. Configs keep their classes, and architectures stay in
    them: which class of a model is built goes by these.
    """
    from vllm.model_executor.models.registry import _ModelRegistry
    from vllm.transformers_utils.config import HFConfigParser
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    from finercut.model.modeling_finercut import PREFIX, PrunedConfig, own_settings

    def of_the_whole_type(parsed: tuple[dict[str, Any], Any], *_: Any) -> tuple[dict[str, Any], Any]:
        settings, config = parsed
        if isinstance(config, PrunedConfig):
            config.model_type = type(config).model_type.removeprefix(f"{PREFIX.lower()}_")
        return settings, config

    def of_the_whole_name(inspected: tuple[Any, str], *_: Any) -> tuple[Any, str]:
        info, architecture = inspected
        return info, architecture.removeprefix(PREFIX)

    def where_the_whole_ones_differ(by_layer: list[Any] | None, convertor: Any) -> list[Any] | None:
        # vLLM refuses configs of latent attention that differ from block to block.
        language = convertor.hf_text_config
        return by_layer if not isinstance(language, PrunedConfig) or own_settings(language) else None

    _change_what_it_returns(HFConfigParser, "parse", of_the_whole_type)
    _change_what_it_returns(_ModelRegistry, "inspect_model_cls", of_the_whole_name)
    _change_what_it_returns(ModelArchConfigConvertorBase, "get_per_layer_hf_configs", where_the_whole_ones_differ)


def _change_what_it_returns(owner: type, name: str, change: Callable[..., Any]) -> None:
    """Have a method's result go through `change`, which is given the method's arguments as well. Once: not again where
    it does."""
    method = getattr(owner, name)
    if getattr(method, "changed_by", None) == __name__:
        return

    @wraps(method)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(method(*args, **kwargs), *args)

    changed.changed_by = __name__
    setattr(owner, name, changed)
