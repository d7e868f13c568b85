"""Makes transformers' Auto classes load pruned checkpoints, as soon as somebody imports them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_configs() -> None:
    """Make transformers' `AutoConfig` know the pruned models of every type it has. May be called again.

    Names only, as transformers keeps its own: the classes cannot be made while transformers is still being imported.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    from finercut.model import modeling_finercut

    for model_type, config_class in list(CONFIG_MAPPING_NAMES.items()):
        if model_type.startswith("finercut_"):
            continue
        pruned = f"finercut_{model_type}"
        CONFIG_MAPPING_NAMES[pruned] = modeling_finercut.PREFIX + config_class
        # Where transformers looks for the classes of a model type.
        sys.modules[f"transformers.models.{model_type_to_module_name(pruned)}"] = modeling_finercut


def register_models() -> None:
    """Make transformers' Auto classes of models that write text know the pruned ones. May be called again.

    `AutoModelForCausalLM` knows them all: language models inside others answer to text alone.
    """
    from transformers.models.auto import modeling_auto as auto

    from finercut.model.modeling_finercut import PREFIX

    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    ):
        for known in {id(m): m for m in (mapping, auto.MODEL_FOR_CAUSAL_LM_MAPPING)}.values():
            _register(known, {of: PREFIX + name for of, name in _whole(mapping).items()})


def register_processors(module: str, name: str) -> None:
    """Make one of transformers' Auto classes of processors know the pruned models. May be called again.

    Args:
        module, name: of its mapping.
    """
    mapping = getattr(sys.modules[module], name)
    _register(mapping, _whole(mapping))


def _whole(mapping: Any) -> dict[str, Any]:
    """The names of classes that one of transformers' mappings has, by the type of the whole model."""
    return {of: name for of, name in mapping._model_mapping.items() if not of.startswith("finercut_")}


def _register(mapping: Any, names: dict[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for model_type, name in names.items():
        pruned = f"finercut_{model_type}"
        if pruned in CONFIG_MAPPING_NAMES:
            mapping._model_mapping[pruned] = name
            # Made from the configs' names when its module was imported, which may have been before ours were among them
            mapping._reverse_config_mapping[CONFIG_MAPPING_NAMES[pruned]] = pruned


_AUTO = "transformers.models.auto"
_PROCESSORS = {
    "processing_auto": "PROCESSOR_MAPPING",
    "image_processing_auto": "IMAGE_PROCESSOR_MAPPING",
    "video_processing_auto": "VIDEO_PROCESSOR_MAPPING",
    "feature_extraction_auto": "FEATURE_EXTRACTOR_MAPPING",
}
_REGISTER: dict[str, Callable[[], None]] = {
    f"{_AUTO}.configuration_auto": register_configs,
    f"{_AUTO}.modeling_auto": register_models,
    **{f"{_AUTO}.{of}": partial(register_processors, f"{_AUTO}.{of}", name) for of, name in _PROCESSORS.items()},
}


class _RegisterAfter(MetaPathFinder, Loader):
    """Imports one module, then registers with it. Registering at once would import torch on `finercut --help`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _REGISTER[self.name]()


def register_when_imported() -> None:
    """Register with the modules of transformers that are imported already, and with the others once they are."""
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _RegisterAfter(name))
