"""Whole and pruned models on disk: loading, masking, removing for good, describing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from finercut.model import modeling_finercut
from finercut.model.checks import explained, quiet, read_config
from finercut.model.configs import read_object
from finercut.model.families import LAYOUT_KEY, Layout, base_architecture, check_supported, is_declared, layout_of
from finercut.model.remote_code import code_sha256, note_trusted, pruned_class, trusts_code
from finercut.model.tensors import safetensors_shapes
from finercut.selection.records import Shares
from finercut.sublayers import KINDS, Sublayer

MODELING_FILE = Path(modeling_finercut.__file__)
# Of a GPU's free memory, what weights may take; the rest is for what is computed. accelerate takes the same.
WEIGHTS_SHARE = 0.9
# Written here; everything else beside the weights is copied.
_REWRITTEN = {"config.json", "README.md", MODELING_FILE.name}


def device_of(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is the GPU where there is one.

    Args:
        local_rank: which of this machine's GPUs `auto` and `cuda` stand for.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies in it; a CPU that does not is several times faster in float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    # Of x86, of x86 with matrix tiles, of ARM.
    return torch.bfloat16 if any(able.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def room_for(weights_bytes: int, free_bytes: Mapping[int, int]) -> dict[int, int]:
    """Which of some GPUs take a model's weights: the first that holds them alone, or else all of them together.

    Args:
        free_bytes: by the GPU's number.

    Returns:
        Bytes that weights may take, of each GPU chosen.

    Raises:
        ValueError: together they do not hold the weights.
    """
    room = {gpu: int(WEIGHTS_SHARE * free) for gpu, free in free_bytes.items()}
    for gpu, allowed in room.items():
        if weights_bytes <= allowed:
            return {gpu: allowed}
    if weights_bytes > sum(room.values()):
        raise _no_room(weights_bytes, room)
    return room


def _no_room(weights_bytes: int, room: Mapping[Any, int]) -> ValueError:
    return ValueError(
        f"the weights are {weights_bytes / 2**30:.3g} GiB, and there is room for "
        f"{' + '.join(f'{allowed / 2**30:.3g}' for allowed in room.values())} GiB on the device: "
        "set search.weights_gib, and they are streamed to it"
    )


def load_whole(
    directory: Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    *,
    room: Mapping[int | str, int] | None = None,
) -> PreTrainedModel:
    """The whole model, for evaluation.

    Args:
        dtype: `auto` keeps what the weights are stored as.
        room: bytes of several devices that weights may take: accelerate spreads them over these, instead of `device`.

    Raises:
        FileNotFoundError: no model there.
        ValueError: it cannot be pruned, its weights do not fit its config, or there is no room for them.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no model in {directory}: run `finercut fetch` first")
    config = read_config(directory)
    check_supported(config)
    safetensors_shapes(directory)  # says more than transformers does of files that are damaged
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trusts_code(directory),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_attention(config),
            **({} if room is None else {"device_map": "auto", "max_memory": dict(room)}),
        )
    wrong = info["missing_keys"] or info["mismatched_keys"]
    if wrong:
        raise ValueError(f"the weights in {directory} do not fit its config: {sorted(map(str, wrong))[:3]}")
    if room is None:
        model.to(device)
    elif set(getattr(model, "hf_device_map", {}).values()) - room.keys():
        # Blocks are not split, so some may be left over: accelerate would read them from the disk each time.
        raise _no_room(sum(p.numel() * p.element_size() for p in model.parameters()), room)
    model.eval()
    if not is_declared(model.config):
        # Imported for those alone; it masks sublayers itself.
        from finercut.model.probe import find_layout

        setattr(model.config, LAYOUT_KEY, find_layout(model).to_dict())
    return model


def load_pruned(
    directory: Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A pruned model, for evaluation.

    Raises:
        FileNotFoundError: no model there.
        ValueError: not one of ours, or its weights do not fit its config.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no pruned model in {directory}: run `finercut prune` first")
    model_type = read_object(directory / "config.json").get("model_type")
    if not str(model_type).startswith("finercut_"):
        raise ValueError(f"{directory} holds a {model_type} model, not a pruned one")
    config = read_config(directory)
    safetensors_shapes(directory)
    with explained(f"{directory} is no pruned checkpoint, or a damaged one"):
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trusts_code(directory),
            ignore_mismatched_sizes=True,
            **_attention(config),
        )
    return model.eval().to(device)


def _attention(config: PreTrainedConfig) -> dict[str, str]:
    # Transformers' default attention leaves soft caps out; vLLM's does not.
    return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}


def removed_sublayers(config: PreTrainedConfig) -> list[Sublayer]:
    """What a pruned model's config says is gone, by depth."""
    return [Sublayer(*removed) for removed in modeling_finercut.removed_sublayers(config)]


@contextmanager
def masked(
    model: PreTrainedModel, removed: Iterable[Sublayer], layout: Layout | None = None
) -> Iterator[PreTrainedModel]:
    """Run the whole `model` with the outputs of some sublayers replaced by zeros, as the authors do.

    Nothing is taken out and the KV cache is filled as ever, so this is what a pruned model is checked against.

    Args:
        layout: the model's family's where none is given.
    """
    layout = layout or layout_of(model.config)
    blocks = model.get_submodule(layout.blocks)
    hooks = []
    for sublayer in removed:
        last = layout.branch(sublayer.kind).members[-1]
        hooks.append(getattr(blocks[sublayer.block], last).register_forward_hook(_zero))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _zero(module: nn.Module, arguments: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@dataclass(frozen=True)
class Sizes:
    """What the whole model's sublayers weigh."""

    parameters: dict[Sublayer, int]
    n_parameters: int
    kv_bytes_per_token: dict[Sublayer, int]

    def shares(self, removed: Iterable[Sublayer]) -> Shares:
        removed = list(removed)
        return Shares(
            sublayers=len(removed) / len(self.parameters),
            parameters=sum(self.parameters[s] for s in removed) / self.n_parameters,
            kv_cache=sum(self.kv_bytes_per_token[s] for s in removed) / sum(self.kv_bytes_per_token.values()),
        )


def sizes(config: PreTrainedConfig, trust_remote_code: bool = False) -> Sizes:
    """Sizes of the whole model that `config` describes; no weights are read. Tied embeddings count once.

    Args:
        trust_remote_code: whether the code beside that config may be run, for models that need it.
    """
    layout = layout_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    element_bytes = torch.empty(0, dtype=config.dtype or torch.float32).element_size()
    parameters, kv_bytes = {}, {}
    for index, block in enumerate(model.get_submodule(layout.blocks)):
        for kind in KINDS:
            members = (getattr(block, name) for name in layout.branch(kind).members)
            sublayer = Sublayer(index, kind)
            parameters[sublayer] = sum(p.numel() for m in members for p in m.parameters())
            kv_bytes[sublayer] = 2 * n_kv_heads * head_dim * element_bytes if kind == "attention" else 0
    return Sizes(parameters, sum(p.numel() for p in model.parameters()), kv_bytes)


def write_pruned(
    whole_directory: Path, removed: Sequence[Sublayer], directory: Path, origin: dict[str, Any], card: str
) -> None:
    """Write the checkpoint of the whole model less `removed` into an empty directory.

    It loads with finercut imported, or with `trust_remote_code=True` through the one file it carries; transformers
    alone refuses it. That of a model with code of its own carries that code too, and loads in the second way only.
    Block numbers are those of the whole model.

    Args:
        removed: in the order of removal.
        origin: JSON values for config.json's `finercut` section: source, revision, hashes, divergence.
        card: README.md, the model card.

    Raises:
        ValueError: nothing or every attention would go, or the model's family is not known.
    """
    whole = load_whole(whole_directory)
    layout = layout_of(whole.config)
    trusted = trusts_code(whole_directory)
    if trusted:
        model_class = pruned_class(whole, whole_directory, directory)
    else:
        model_class = getattr(modeling_finercut, modeling_finercut.PREFIX + base_architecture(whole.config.model_type))
    config = pruned_config(model_class, whole.config, layout, removed, origin)
    with torch.device("meta"):
        pruned = model_class(config)
    names = pruned.state_dict().keys()
    # The whole model's own tensors: nothing is copied in memory.
    pruned.load_state_dict({n: t for n, t in whole.state_dict().items() if n in names}, assign=True)
    if whole.can_generate() and not (whole_directory / "generation_config.json").is_file():
        pruned.generation_config = whole.generation_config
    pruned.save_pretrained(directory)
    for file in whole_directory.iterdir():
        if file.is_file() and file.name not in _REWRITTEN and ".safetensors" not in file.name:
            shutil.copyfile(file, directory / file.name)
    if trusted:
        note_trusted(directory, code_sha256(directory))
    (directory / "README.md").write_text(card, encoding="utf-8")


def pruned_config(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    layout: Layout,
    removed: Sequence[Sublayer],
    origin: dict[str, Any],
) -> PreTrainedConfig:
    """The config of the pruned model, which is of `model_class`: the whole one's `config`, the skipped sublayers, and
    where the model comes from."""
    if not removed:
        raise ValueError("nothing to remove")
    skip: dict[str, dict[str, list[str]]] = {}
    for sublayer in sorted(removed):
        skip.setdefault(str(sublayer.block), {"skip": []})["skip"].append(sublayer.kind)
    config_class = model_class.config_class
    settings = config.to_dict()
    for name in ("model_type", "transformers_version", LAYOUT_KEY):
        settings.pop(name, None)
    settings["architectures"] = [model_class.__name__]
    file = model_class.__module__.rpartition(".")[2]
    settings["auto_map"] = {
        "AutoConfig": f"{file}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{file}.{model_class.__name__}",
    }
    settings["finercut"] = {"layout": layout.to_dict(), **origin, "removals": [str(s) for s in removed]}
    return config_class(**settings, per_layer_config=skip)


def describe(directory: Path) -> str:
    """A checkpoint in a few lines, from its config alone.

    Raises:
        FileNotFoundError: no config.json there.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {directory}: it has no config.json")
    config = read_config(directory)
    removed = removed_sublayers(config)
    if not removed:
        return f"whole {config.model_type} model, {config.num_hidden_layers} blocks, nothing removed"
    origin = config.finercut
    rows = {f"{kind} removed": [s.block for s in removed if s.kind == kind] for kind in KINDS}
    lines = [
        f"{config.architectures[0]}, {config.num_hidden_layers} blocks, {len(removed)} of "
        f"{2 * config.num_hidden_layers} sublayers removed",
        *(f"  {name}: {', '.join(map(str, blocks)) or 'none'}" for name, blocks in rows.items()),
        *(f"  {name}: {value}" for name, value in origin.items() if name not in ("layout", "removals")),
        f"  order of removal: {' '.join(origin['removals'])}",
    ]
    return "\n".join(lines)
