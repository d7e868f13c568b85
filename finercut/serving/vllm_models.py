"""vLLM's own model classes with sublayers removed.

`FinerCut<Base>` exists here for every model class `<Base>` of vLLM, made when it is asked for. Each block loses its
removed sublayers right after vLLM has built it and before it builds the next one, so that a pruned model never needs
the memory of the whole one, and its removed attentions get no KV cache. Some families vLLM runs by transformers' code:
their blocks lose them before vLLM gives any module memory.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.quantizers import AutoHfQuantizer
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models import utils

from finercut.model import modeling_finercut
from finercut.model.configs import QUANTISATION
from finercut.model.modeling_finercut import PREFIX, branch_of, kept_attentions, removed_sublayers

# Where vLLM's blocks call a member otherwise than transformers' do, by the block's class.
RENAMED = {
    "MixtralDecoderLayer": {"mlp": "block_sparse_moe"},
    "Lfm2ShortConvDecoderLayer": {"conv": "short_conv"},
    "Lfm2MoeShortConvDecoderLayer": {"conv": "short_conv"},
    "TransformerBlock": {"self_attn": "attn"},  # gpt-oss
}
# Sublayers that give a pair, by the block's class: (output, bias to be added) as vLLM's linear layers do, or (output,
# residual stream).
IN_PAIRS = {"FalconDecoderLayer": ("attention", "mlp"), "FalconH1ParallelHybrid": ("attention",)}


class RemovedNorm(nn.Module):
    """Stands for a removed sublayer's norm, fused with the addition to the residual stream or not.

    vLLM's blocks hand on (what is still to be added, residual stream). A fused norm adds the one to the other; leaving
    both as they are lets the next norm do it. The model's first norm, and every norm of a block that adds by itself, is
    given the residual stream alone: nothing is to be added then.
    """

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return torch.zeros_like(hidden_states)
        return hidden_states, residual


class RemovedCore(nn.Module):
    """Stands for a removed sublayer's core.

    Args:
        has_norm: a `RemovedNorm` before it gives it what is to be added to the residual stream already, to be handed
            on. Without one it is given the residual stream, and adds nothing.
        in_pair: what stood there gave two values.
    """

    def __init__(self, has_norm: bool, in_pair: bool) -> None:
        super().__init__()
        self.has_norm = has_norm
        self.in_pair = in_pair

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, None]:
        # Families name and order a core's arguments differently; positions are integers.
        given = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.is_floating_point()]
        added = given[0] if self.has_norm else torch.zeros_like(given[0])
        if self.in_pair:
            return added, None
        # Some return nothing, and write into a second tensor.
        if len(given) > 1 and given[1].shape == added.shape:
            given[1].copy_(added)
        return added


class WithBias(nn.Module):
    """Gives what vLLM's linear layers give, where one of them is a member of its own: (output, bias to be added)."""

    def __init__(self, removed: nn.Module) -> None:
        super().__init__()
        self.removed = removed

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.removed(hidden_states), None


def remove_sublayer(block: nn.Module, prefix: str, kind: str, branch: dict[str, Any], vllm_config: VllmConfig) -> None:
    """Take one sublayer out of a block that vLLM has just built.

    Args:
        prefix: the block's name in the model.
        branch: where it is, as in the checkpoint's config.

    Raises:
        ValueError: vLLM's block has no such members.
    """
    beside = branch.get("beside", ())
    in_pair = kind in IN_PAIRS.get(type(block).__name__, ())
    replacements: dict[str, nn.Module] = {}
    for path in (branch, *beside):
        replacements |= {name: RemovedNorm() for name in path["before"]}
        # Of several that run in parallel the first hands on what is to be added, and the others add nothing to it.
        replacements[path["core"]] = RemovedCore(path is branch and bool(branch["before"]), in_pair)
        replacements |= {name: nn.Identity() for name in path["after"]}
    renamed = RENAMED.get(type(block).__name__, {})
    replacements = {renamed.get(name, name): replacement for name, replacement in replacements.items()}
    there = dict(block.named_modules(remove_duplicate=False))
    missing = [name for name in replacements if name not in there]
    if missing:
        raise ValueError(
            f"vLLM's {type(block).__name__} has no {', '.join(missing)}: cannot serve it without {prefix}.{kind}"
        )
    removed: set[nn.Module] = set()
    for name, replacement in replacements.items():
        removed.update(there[name].modules())
        block.set_submodule(name, WithBias(replacement) if isinstance(there[name], LinearBase) else replacement)
    # vLLM looks here for what needs a KV cache, or an expert's kernels.
    compilation = vllm_config.compilation_config
    gone = {name for name, module in compilation.static_forward_context.items() if module in removed}
    for name in gone:
        del compilation.static_forward_context[name]
    compilation.static_all_moe_layers[:] = [name for name in compilation.static_all_moe_layers if name not in gone]


@contextmanager
def removing(vllm_config: VllmConfig, model_class: type, inside: str = "") -> Iterator[None]:
    """Whatever model vLLM builds inside lacks the sublayers that its config lists as skipped.

    Args:
        model_class: vLLM's, which knows where the blocks are if its modules have other names than transformers'.
        inside: what the model is part of, such as a model that it drafts for.

    Raises:
        ValueError: the model's blocks were not built where the config says they are.
    """
    config = vllm_config.model_config.hf_config
    removed = removed_sublayers(config)
    if not removed:
        yield
        return
    layout = (config.finercut or {}).get("layout")
    if layout is None:
        raise ValueError(f"{type(config).__name__} skips sublayers but has no finercut.layout to find them by")
    blocks = utils.maybe_prefix(inside, _renaming(config, model_class)(f"{layout['blocks']}.").removesuffix("."))
    built = []

    def make_layers(num_hidden_layers: int, layer_fn: Callable[..., nn.Module], prefix: str) -> Any:
        if prefix != blocks:
            return original(num_hidden_layers, layer_fn, prefix)
        built.append(prefix)

        def make_block(prefix: str) -> nn.Module:
            block = layer_fn(prefix=prefix)
            for index, kind in removed:
                if prefix == f"{blocks}.{index // layout.get('blocks_each', 1)}":
                    remove_sublayer(block, prefix, kind, branch_of(layout, kind, index), vllm_config)
            return block

        return original(num_hidden_layers, make_block, prefix)

    original = utils.make_layers
    with _replaced_wherever_imported(original, make_layers):
        yield
    if not built:
        raise ValueError(f"vLLM built no blocks at {blocks}: cannot serve {type(config).__name__}")


def _renaming(config: Any, model_class: type) -> Callable[[str], str]:
    """What names of weights become in vLLM's model where it nests a language model otherwise than transformers does."""
    mapper = getattr(model_class, "hf_to_vllm_mapper", None)
    if mapper is None or config.get_text_config() is config:
        return lambda name: name
    renames = mapper.get_rename_mapper()
    return lambda name: renames.map_name(name) or name


@contextmanager
def _replaced_wherever_imported(function: Callable[..., Any], replacement: Callable[..., Any]) -> Iterator[None]:
    # Models import it by name: each module that did holds its own reference. Some are imported meanwhile.
    def replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("vllm.") and getattr(module, function.__name__, None) is old:
                setattr(module, function.__name__, new)

    replace(function, replacement)
    try:
        yield
    finally:
        replace(replacement, function)


class CheckedWeights:
    """Refuses weights that do not fit the config: vLLM itself leaves a missing projection unset."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        # Dummy weights are filled in piece by piece by whoever asked for them.
        self._stored_config = vllm_config.model_config.hf_config
        self._weights_to_check = vllm_config.load_config.load_format != "dummy"
        # Each rank is then given its own experts alone.
        parallel = vllm_config.parallel_config
        self._few_experts = parallel.enable_expert_parallel and parallel.enable_ep_weight_filter

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As vLLM's, but the first time every weight must be there.

        Raises:
            ValueError: the checkpoint's weights are not the ones its config asks for.
        """
        seen: set[str] = set()

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                seen.add(name)
                yield name, weight

        loaded = super().load_weights(noted())
        if self._weights_to_check:
            renamed = _renaming(self._stored_config, type(self))
            _check_names(self._stored_config, seen, renamed, self._few_experts)
            self._weights_to_check = False
        return loaded


def _class_name(config: Any) -> str:
    """Of the pruned model's class, which vLLM is given by the whole one's name."""
    return PREFIX + config.architectures[0].removeprefix(PREFIX)


def _check_names(config: Any, seen: set[str], renamed: Callable[[str], str], few_experts: bool = False) -> None:
    with torch.device("meta"):
        model = getattr(modeling_finercut, _class_name(config))(config)
        if getattr(config, QUANTISATION, None):
            # transformers gives the model the names that quantised weights are stored by.
            quantiser = AutoHfQuantizer.from_config(copy.deepcopy(config.quantization_config))
            quantiser.validate_environment()
            quantiser.preprocess_model(model)
    # What lies around a language model has several names in files, all of which vLLM knows; so have its experts.
    inside = f"{config.finercut['layout']['blocks']}." if config.get_text_config() is not config else ""

    def compared(names: Iterable[str]) -> dict[str, str]:
        by_renamed = {renamed(name): name for name in names}
        return {
            key: name
            for key, name in by_renamed.items()
            if key.startswith(renamed(inside)) and not ((inside or few_experts) and ".experts." in key)
        }

    # By the names in a checkpoint, where experts are apart. A tied weight is a parameter once, under the name it is
    # stored by, and in the state twice.
    needed = compared(revert_weight_conversion(model, dict(model.named_parameters())))
    known, stored = compared(revert_weight_conversion(model, model.state_dict())), compared(seen)
    missing = [needed[key] for key in needed.keys() - stored.keys()]
    unexpected = [stored[key] for key in stored.keys() - known.keys()]
    wrong = {what: sorted(names) for what, names in (("missing", missing), ("unexpected", unexpected)) if names}
    if wrong:
        found = "; ".join(f"{what}: {', '.join(names[:3])} ({len(names)})" for what, names in wrong.items())
        raise ValueError(f"weights and config.json do not belong together: {found}")


def _check_ranks(vllm_config: VllmConfig) -> None:
    """
    Raises:
        ValueError: a rank of a pipeline would have no attention, of which vLLM cannot make a KV cache.
    """
    config, n_ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.pipeline_parallel_size
    if n_ranks == 1:
        return
    language = config.get_text_config()
    n_each = (language.finercut or {})["layout"].get("blocks_each", 1)
    kept = {block // n_each for block in kept_attentions(language)}
    for rank in range(n_ranks):
        first, end = get_pp_indices(language.num_hidden_layers // n_each, rank, n_ranks)
        if kept.isdisjoint(range(first, end)):
            raise ValueError(
                f"pipeline_parallel_size = {n_ranks}: of blocks {first} to {end - 1}, those of rank {rank}, every "
                "attention is removed, and vLLM needs one for its KV cache: use tensor_parallel_size, or set "
                "VLLM_PP_LAYER_PARTITION"
            )


class PrunedModel(CheckedWeights):
    """What a pruned model adds to vLLM's own: it builds kept sublayers only."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        _check_ranks(vllm_config)
        with removing(vllm_config, type(self), prefix):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)


class PrunedTransformersModel(CheckedWeights):
    """What a pruned model adds to one that vLLM runs by transformers' code: that code is the pruned model's own.

    Raises:
        ValueError: pipeline parallel is asked for.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        n_ranks = vllm_config.parallel_config.pipeline_parallel_size
        if n_ranks > 1:
            # A rank would look for attentions by their blocks' numbers, and finds them numbered anew.
            raise ValueError(
                f"pipeline_parallel_size = {n_ranks}: vLLM runs {config.architectures[0]} by transformers' code, and "
                "cannot divide it so without some attentions; use tensor_parallel_size"
            )
        # vLLM has transformers make it, without its head and without memory, before its own layers take their places.
        base = MODEL_MAPPING_NAMES[config.model_type]
        AutoModel.register(type(config), getattr(modeling_finercut, PREFIX + base), exist_ok=True)
        # The names that weights have in files are known to transformers once the class that reads them is made.
        getattr(modeling_finercut, _class_name(config))
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _create_attention_instances(self, prefix: str = "") -> None:
        whole = self.text_config
        self.text_config = self.config.get_text_config(decoder=True)  # of the kept attentions, numbered anew
        super()._create_attention_instances(prefix)
        self.text_config = whole


def __getattr__(name: str) -> Any:
    base = ModelRegistry.models.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base_class = base.load_model_cls()
    by_transformers = base_class.__module__.startswith("vllm.model_executor.models.transformers")
    body = {"__module__": __name__, "__doc__": f"vLLM's `{name.removeprefix(PREFIX)}` less the removed sublayers."}
    globals()[name] = type(name, (PrunedTransformersModel if by_transformers else PrunedModel, base_class), body)
    return globals()[name]
