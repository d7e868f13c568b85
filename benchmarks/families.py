"""Which model types of transformers can be pruned: `python benchmarks/families.py docs/families-table.md`.

Every causal and every image-text-to-text type gets a tiny random model: its default config, with the sizes in `SMALL`.
Every third sublayer that may go is removed, and the checkpoint's logits are compared with those of the whole model
with the same sublayers masked, with a cache and without. Each type runs in a process of its own, forked from this one,
so that no type can end the others. Names on the command line after the file try these types alone.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import finercut
from finercut.checkpoint.writing import write_pruned
from finercut.model.directory import quiet
from finercut.model.families import FAMILIES, check_supported, fixed_sublayers, layout_of
from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked

TIMEOUT_S = 120
MOST_PARAMETERS = 30_000_000
TOLERANCE = 1e-4
N_BLOCKS = 4
SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    # Widths.
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim", "out_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size_mlp", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("index_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "index_topk"), 8),
    **dict.fromkeys(("head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank", "global_head_dim"), 16),
    "vocab_size_per_layer_input": 400,
    "word_embed_proj_dim": 64,
    # Depths and heads.
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth"), N_BLOCKS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "index_n_heads"), 2),
    # Mixtures of experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "first_k_dense_replace": 1,
    # State space models, linear attention, convolutions.
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "mamba_d_ssm": 128,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "sliding_window": 16,
}
SKIPPED = ("max_window_layers", "mlp_only_layers", "full_attn_idxs")


def tiny(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a small model of the same type."""
    settings: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        own = getattr(config, name, None)
        if isinstance(own, PreTrainedConfig):
            settings[name] = {"model_type": own.model_type, **tiny(own)}
        elif name in SMALL and isinstance(value, int) and (value > SMALL[name] or isinstance(value, bool)):
            settings[name] = SMALL[name]
        elif name.endswith("layer_types") or name == "layers_block_type":
            if isinstance(value, list) and value and not name.startswith("mtp"):
                settings[name] = _varied(value)
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings[name] = ("bos_token_id", "eos_token_id", "pad_token_id").index(name)
        elif name.endswith("token_id") and isinstance(value, int) and value >= 300:
            settings[name] = 300 + len(name)
    return settings


def _varied(sorts: list[str]) -> list[str]:
    """As many of them as there are blocks, each sort once at least, in the order in which they are met."""
    first = sorts[:N_BLOCKS]
    missing = [sort for sort in dict.fromkeys(sorts) if sort not in first]
    return [*first[: N_BLOCKS - len(missing)], *missing][:N_BLOCKS]


def random_model(model_type: str, auto: Any) -> Any:
    """A tiny random model, norms and biases random too."""
    config_class = CONFIG_MAPPING[model_type]
    settings = tiny(config_class())
    config = config_class(**settings)
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
def difference(whole: Any, pruned: Any, tokens: torch.Tensor, removed: Any) -> float:
    """Largest one of logits, in one forward and in two with a cache."""
    with masked(whole, removed):
        expected = whole(tokens, use_cache=False).logits
        in_parts = _in_parts(whole, tokens)
    largest = [(pruned(tokens, use_cache=False).logits - expected).abs().max()]
    largest.append((_in_parts(pruned, tokens) - in_parts).abs().max())
    return torch.stack(largest).max().item()


def _in_parts(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    first = model(tokens[:, :-4], use_cache=True)
    second = model(tokens[:, -4:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, second.logits], 1)


def attempt(model_type: str) -> dict[str, str]:
    """What came of one type."""
    auto = AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    try:
        check_supported(CONFIG_MAPPING[model_type]())
    except ValueError as error:
        return {"result": "refused", "why": _line(error)}
    # Whatever else a config or a model raises is about the tiny one: the type was not tried.
    try:
        made = random_model(model_type, auto)
        tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))
        made(tokens, use_cache=False)
    except Exception as error:
        return {"result": "not tried", "why": f"no tiny model: {_line(error)}"}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        try:
            made.save_pretrained(directory / "whole")
            whole = load_whole(directory / "whole", torch.float32)
            fixed, n_blocks = fixed_sublayers(whole.config), whole.config.num_hidden_layers
            removed = [s for s in layout_of(whole.config).sublayers(n_blocks) if s not in fixed][::3]
            write_pruned(directory / "whole", removed, directory / "pruned", {}, "")
            pruned = load_pruned(directory / "pruned", torch.float32)
        except ValueError as error:
            return {"result": "refused", "why": _line(error)}
        largest = difference(whole.eval(), pruned, tokens, removed)
    if not largest <= TOLERANCE:
        return {"result": "wrong", "why": f"logits differ by {largest:.2g}"}
    found = "declared" if model_type in FAMILIES else "found by the probe"
    return {"result": "works", "why": f"{found}; largest difference {largest:.1g}"}


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{text.split(' Found blocks at')[0][:160]}" or type(error).__name__


def _send(model_type: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    with quiet():
        try:
            pipe.send(attempt(model_type))
        except Exception as error:
            pipe.send({"result": "wrong", "why": f"{type(error).__name__}: {_line(error)}"})


def in_its_own_process(model_type: str) -> dict[str, str]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(model_type, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(TIMEOUT_S):
            return {"result": "not tried", "why": f"took longer than {TIMEOUT_S} s"}
        return ours.recv()
    except EOFError:
        return {"result": "wrong", "why": "its process died"}
    finally:
        process.kill()
        process.join()


def table(found: dict[str, dict[str, str]]) -> str:
    counts = Counter(one["result"] for one in found.values())
    told = ", ".join(f"{n} {result}" for result, n in counts.most_common())
    rows = [f"| {name} | {one['result']} | {one['why']} |" for name, one in sorted(found.items())]
    return "\n".join(
        [
            "# Model types of transformers",
            "",
            f"Made by `make families` with transformers {transformers.__version__}, torch {torch.__version__} and "
            f"finercut {finercut.__version__},",
            "on a tiny random model of each causal and image-text-to-text type; what the words mean is in",
            f"[families.md](families.md). {told}.",
            "",
            "| model type | result | how, or why not |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    file, *chosen = sys.argv[1:]
    known = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    names = chosen or sorted(name for name in known if not name.startswith("finercut_") and name in CONFIG_MAPPING)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        found[name] = in_its_own_process(name)
        print(f"{name:32} {found[name]['result']:10} {found[name]['why']}", flush=True)
    Path(file).write_text(table(found), encoding="utf-8")
    print(json.dumps(dict(Counter(one["result"] for one in found.values()))))


if __name__ == "__main__":
    main()
