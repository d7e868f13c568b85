"""Entry point that makes vLLM know pruned checkpoints. vLLM calls it in every process it starts."""

from __future__ import annotations


def register() -> None:
    """Register the configs with transformers and the model classes with vLLM. May be called again.

    Model classes go by name: vLLM imports them when it serves one, and not before, so that CUDA is left alone.
    """
    from vllm import ModelRegistry

    from finercut.model import families, registration
    from finercut.model.modeling_finercut import PREFIX

    registration.register_configs()
    served = ModelRegistry.get_supported_archs()
    for base in sorted({families.base_architecture(model_type) for model_type in families.FAMILIES}):
        name = PREFIX + base
        if base in served and name not in served:
            ModelRegistry.register_model(name, f"finercut.serving.vllm_models:{name}")
