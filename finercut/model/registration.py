"""Makes transformers' Auto classes load pruned checkpoints, as soon as somebody imports them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


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
    """Make transformers' `AutoModelForCausalLM` know the pruned models, by name too. May be called again."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from finercut.model.modeling_finercut import PREFIX

    for model_type, architecture in list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if model_type.startswith("finercut_"):
            continue
        pruned = f"finercut_{model_type}"
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[pruned] = PREFIX + architecture
        # Made from the configs' names when that module was imported, which may have been before ours were among them.
        MODEL_FOR_CAUSAL_LM_MAPPING._reverse_config_mapping[CONFIG_MAPPING_NAMES[pruned]] = pruned


_REGISTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_configs,
    "transformers.models.auto.modeling_auto": register_models,
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
