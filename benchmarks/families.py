"""Which model types of the installed transformers can be pruned: `make families`.

Every causal and every image-text-to-text type gets a tiny random model: its default config with the sizes in `SMALL`.
Every third sublayer that may go is removed. The checkpoint's logits are compared with those of the whole model with the
same sublayers masked, with a KV cache and without, and what the search computes block by block with the whole model's.
Each type runs in a process of its own, forked from this one. Types with a row in the file keep it, unless a pattern
(`gemma*`) names them: an interrupted run is continued so. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from finercut.checkpoint.writing import write_pruned
from finercut.model.caches import forward
from finercut.model.checks import check_sizes
from finercut.model.directory import quiet
from finercut.model.families import FAMILIES, auto_class, check_supported, fixed_sublayers, layout_of
from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.selection.blocks import Blocks

CPU_S = 120
MOST_PARAMETERS = 30_000_000
TOLERANCE = 1e-4
N_BLOCKS = 6
SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "vocab_size_per_layer_input": 400,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "tie_word_embeddings": False,
    # Widths.
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim", "out_hidden_size"), 64),
    **dict.fromkeys(("embed_dim", "projection_dim", "vision_output_dim", "encoder_hidden_size", "output_dim"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "text_hidden_size", "projector_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size_mlp", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("rotary_dim", "qk_nope_head_dim", "index_topk"), 8),
    **dict.fromkeys(
        ("head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank", "global_head_dim"), 16
    ),
    "index_head_dim": 32,
    # Depths and heads.
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), N_BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "index_n_heads", "num_kv_shared_layers"), 2),
    # Mixtures of experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    # State space models, linear attention, convolutions.
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "index_kpool"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    "linear_num_key_heads": 2,
}
_INDEXER = dict.fromkeys(("indexer_n_heads", "indexer_compress_ratio"), 4)
_INDEXER |= {"indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
_ROPE_BY_TYPE = {"rope_parameters": {"full_attention": {"rope_theta": 1e4, "mrope_section": [3, 3, 2]}}}
_IMAGE_TOKEN = {"vocabulary_map": {"<image>": 399}}
# By type: what its default config lacks, or has otherwise than models that people use.
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": list(range(1, N_BLOCKS, 2))},
    "chameleon": _IMAGE_TOKEN,
    "cohere_compass": {"text_config": _ROPE_BY_TYPE},
    "cohere_compass_text": _ROPE_BY_TYPE,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse"] * (N_BLOCKS // 2),
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        }
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": _IMAGE_TOKEN,
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full"] * (N_BLOCKS // 3)},
    "gpt_neo": {"attention_types": [[["global", "local"], N_BLOCKS // 2]]},
    "granite4_vision": {
        "text_config": {"model_type": "granite4_vision_text"},
        "deepstack_layer_map": [[-2, 0]],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * (N_BLOCKS // 2)},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "hy_v4": {"indexer_types": ["full", "shared", "full"] * (N_BLOCKS // 3)},
    "longcat_flash": {"qk_rope_head_dim": 8, "head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (N_BLOCKS // 2)},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "step3p7": {"text_config": {"sliding_window": 16}},
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Lists with an entry a block.
PER_BLOCK = ("layers_block_type", "activation_sparsity_pattern", "no_rope_layers")


@dataclass(frozen=True)
class Outcome:
    result: str
    """works, refused, wrong, or not tried."""
    why: str
    difference: str = ""
    """The largest of two logits whose spread is about 1."""


def tiny(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a small model of the same type."""
    settings: dict[str, Any] = {}
    usual = type(config)().to_dict()
    for name, value in config.to_dict().items():
        own = config.__dict__.get(name)
        if isinstance(own, PreTrainedConfig):
            settings[name] = {"model_type": own.model_type, **tiny(own)}
        elif name == "head_dim" and hasattr(config, "qk_rope_head_dim"):
            continue  # which it is made from
        elif name == "num_key_value_heads" and hasattr(config, "kv_lora_rank"):
            settings[name] = SMALL["num_attention_heads"]  # latent attention has as many
        elif name in SMALL and isinstance(value, int) and (value > SMALL[name] or isinstance(value, bool)):
            settings[name] = SMALL[name]
        elif name == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value and has_sections(config):
            settings[name] = value | {"mrope_section": [3, 3, 2], "partial_rotary_factor": 1.0}
        elif name.endswith("layer_types") or name in PER_BLOCK:
            if isinstance(value, list) and value and not name.startswith("mtp"):
                settings[name] = varied(value)
        elif name in SPECIAL_TOKENS:
            settings[name] = SPECIAL_TOKENS.index(name)
        elif name.endswith("token_id") and isinstance(value, int) and value >= 300:
            settings[name] = 300 + len(name)
        elif value != usual.get(name):
            settings[name] = value  # which the config around it asks for
    return settings


def has_sections(config: PreTrainedConfig) -> bool:
    """Whether its rotary embeddings are of three dimensions, whose sections must sum to half a head."""
    code = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    return "mrope_section" in inspect.getsource(code)


def merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `more` in them, config by config."""
    inner = {k: merged(settings[k], v) for k, v in more.items() if isinstance(v, dict) and k in settings}
    return settings | more | inner


def varied(sorts: list[Any]) -> list[Any]:
    """As many of them as there are blocks, in turn."""
    return list(islice(cycle(dict.fromkeys(sorts)), N_BLOCKS))


def random_model(model_type: str) -> Any:
    """A tiny random model, norms and biases random too.

    Raises:
        ValueError: it is not tiny.
    """
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**merged(tiny(config_class()), MORE.get(model_type, {})))
    auto = auto_class(config)
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in auto.from_config(config).parameters())
    if n_parameters > MOST_PARAMETERS:
        raise ValueError(f"its config stays large: {n_parameters / 1e6:.0f} million parameters")
    generator = torch.Generator().manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@torch.no_grad()
def largest_difference(whole: Any, pruned: Any, tokens: Tensor, removed: Any) -> float:
    """Of logits: in one forward, in two with a cache, and of the search's blocks."""
    with masked(whole, removed):
        expected = whole(tokens, use_cache=False).logits
        in_parts = _in_parts(whole, tokens)
    blocks = Blocks(whole, layout_of(whole.config), tokens[:1])
    states = blocks.embed(tokens[1:])
    for unit in blocks.units:
        states = blocks.run(unit, states, removed)
    pairs = [
        (pruned(tokens, use_cache=False).logits, expected),
        (_in_parts(pruned, tokens), in_parts),
        (blocks.logits(states), expected[1:]),
    ]
    return max((found - logits).abs().max().item() for found, logits in pairs)


def _in_parts(model: Any, tokens: Tensor) -> Tensor:
    first, cache = forward(model, tokens[:, :-4])
    second, _ = forward(model, tokens[:, -4:], cache)
    return torch.cat([first.logits, second.logits], 1)


def attempt(model_type: str) -> Outcome:
    """What comes of one type."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:
        # A config class that needs arguments fails without them in any way.
        return Outcome("not tried", f"no default config: {_line(error)}")
    try:
        check_supported(config)
        check_sizes(config.get_text_config())
    except ValueError as error:
        return Outcome("refused", _line(error))
    # Whatever a tiny config or its model raises is about the tiny one: the type was not tried.
    try:
        made = random_model(model_type)
        tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))
        made(tokens, use_cache=False)
    except Exception as error:
        if re.search("missing .* positional argument|pixel_values", str(error)):
            return Outcome("refused", f"it does not run on text alone: {_line(error)}")
        return Outcome("not tried", f"no tiny model: {_line(error)}")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        try:
            made.save_pretrained(directory / "whole")
            whole = load_whole(directory / "whole", torch.float32)
            language, fixed = whole.config.get_text_config(), fixed_sublayers(whole.config)
            n_blocks = language.num_hidden_layers
            removed = [s for s in layout_of(whole.config).sublayers(n_blocks) if s not in fixed][::3]
            (directory / "pruned").mkdir()
            write_pruned(directory / "whole", removed, directory / "pruned", {}, "")
            pruned = load_pruned(directory / "pruned", torch.float32)
            largest = largest_difference(whole, pruned, tokens, removed)
        except ValueError as error:
            return Outcome("refused", _line(error))
    inside = "" if language is whole.config else f", {language.model_type} inside"
    return Outcome(
        "works" if largest <= TOLERANCE else "wrong",
        ("declared" if language.model_type in FAMILIES else "found by the probe") + inside,
        f"{largest:.1g}",
    )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    # What to do about it is not for a table.
    for rest in (" Found blocks at", ": take the model"):
        text = text.split(rest)[0]
    return text[:200] or type(error).__name__


def _send(model_type: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    torch.set_num_threads(1)
    with quiet():
        try:
            pipe.send(attempt(model_type))
        except Exception as error:
            # A type that fails in a way nobody foresaw is a row of the table, not the end of the run.
            pipe.send(Outcome("wrong", f"{type(error).__name__}: {_line(error)}"))


def in_its_own_process(model_type: str) -> Outcome:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(model_type, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return Outcome("not tried", f"takes more than {CPU_S} s of CPU")
        return Outcome("wrong", f"its process died ({process.exitcode})")
    finally:
        process.kill()
        process.join()


def read_rows(file: Path) -> dict[str, Outcome]:
    """Of an earlier run; none where there is no file."""
    if not file.is_file():
        return {}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in file.read_text(encoding="utf-8").splitlines()]
    return {row[0]: Outcome(row[1], row[2], row[3]) for row in rows[2:] if len(row) == 4}


def table(found: dict[str, Outcome]) -> str:
    counts = Counter(outcome.result for outcome in found.values())
    rows = [f"| {name} | {o.result} | {o.why} | {o.difference} |" for name, o in sorted(found.items())]
    return "\n".join(
        [
            "# Model types of transformers",
            "",
            "Every causal and image-text-to-text type, tried on a tiny random model by `make families`;",
            f"[Families](families.md) says more. transformers {transformers.__version__}, torch {torch.__version__}: "
            f"{', '.join(f'{n} {result}' for result, n in counts.most_common())}.",
            "The difference is the largest between logits of the pruned and of the masked whole model, with a KV cache",
            "and without, and of the search's blocks.",
            "",
            "| model type | result | how, or why not | difference |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the table, in Markdown; made, or continued")
    parser.add_argument("patterns", nargs="*", help="types to try again, gemma* for instance")
    arguments = parser.parse_args()
    file, patterns = arguments.file, arguments.patterns
    known = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    names = sorted(name for name in known if not name.startswith("finercut_") and name in CONFIG_MAPPING)
    found = {name: outcome for name, outcome in read_rows(file).items() if name in names}
    for name in names:
        if any(fnmatch(name, pattern) for pattern in patterns) or not (patterns or name in found):
            found[name] = in_its_own_process(name)
            print(f"{name:32} {found[name].result:10} {found[name].why} {found[name].difference}", flush=True)
            file.write_text(table(found), encoding="utf-8")
    print(json.dumps(Counter(outcome.result for outcome in found.values())))


if __name__ == "__main__":
    main()
