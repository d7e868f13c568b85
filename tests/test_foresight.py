"""What later stages would refuse, found once there is a model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import random_llama
from family_models import CASES, HYBRIDS, SHARED, random_model
from multimodal_models import random_wrapper
from vllm_cases import NO_WINDOWS, model_for_vllm

from finercut.checkpoint.writing import write_all_but_weights
from finercut.evaluation.settings import Samples, Task
from finercut.healing.settings import Reconstruct, Refit
from finercut.model.directory import ModelDirectory
from finercut.model.layouts import note_layout
from finercut.selection.settings import Refitting
from finercut.serving import foresight as vllm_foresight
from finercut.serving.foresight import Answer
from finercut.serving.settings import EngineSettings
from finercut.system.records import Environment
from pipelines import fetch, flow, foresight, params, paths, search_job
from pipelines.foresight import _one_of_each, questions

# Heads of 32, the least that vLLM's attention takes on a CPU.
WIDE = {"hidden_size": 128, "head_dim": 32}
PLAIN = {"concurrency": 2, "dtype": "float32", "max_model_len": 64, "kv_cache_gib": 0.1, "enforce_eager": True}
ENGINES = {
    # Where the first one is refused, so are all.
    "bfloat16": {"dtype": "bfloat16"},
    "plain": {},
    "float16": {"dtype": "float16"},
    "long": {"max_model_len": 300},
    "three ranks": {"tensor_parallel_size": 3},
    "two stages": {"pipeline_parallel_size": 2},
    # A block of 128 tokens of the llama's cache is 128 x 4 attentions x 2 heads x 32 x 2 (keys, values) x 4 bytes,
    # 0.25 MiB. vLLM keeps one, 256 tokens take two, and this is 2.5; of 3 attentions it is 3.3.
    "small cache": {"max_model_len": 256, "kv_cache_gib": 2.5 * 0.25 / 1024},
}
MODELS = {
    "llama": lambda: random_llama(),
    "small heads": lambda: random_llama(num_attention_heads=8),
    "gemma2": lambda: model_for_vllm("gemma2"),
    "olmo2": lambda: model_for_vllm("olmo2"),
    "stablelm": lambda: random_model("stablelm", **WIDE),
    "helium": lambda: random_model("helium", **WIDE),
    "gpt2": lambda: random_model(*CASES["gpt2"][:1], **CASES["gpt2"][1] | {"hidden_size": 128}),
    "smolvlm": lambda: random_wrapper("smolvlm"),
    "gemma3": lambda: random_wrapper("gemma3"),
    "mamba": lambda: random_model(*HYBRIDS["mamba"][:1], **HYBRIDS["mamba"][1]),
    "qwen3_next": lambda: random_model(*HYBRIDS["qwen3_next"][:1], **HYBRIDS["qwen3_next"][1] | WIDE),
    # Its embeddings are not tied, and its attention's output has a bias: vLLM has no place for one or the other.
    "bloom": lambda: random_model("bloom", hidden_size=128),
    "qwen3": lambda: random_model(*CASES["qwen3"][:1], **CASES["qwen3"][1] | WIDE | NO_WINDOWS),
}
LOST = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def answers(tmp_path_factory, tokenizer) -> dict[str, dict[str, str | None]]:
    """What vLLM says of models, and of each less some sublayers, in one process."""
    root, asked = tmp_path_factory.mktemp("asked"), {}
    for name, make in MODELS.items():
        make().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        whole = note_layout(ModelDirectory(root / name))
        pruned = write_all_but_weights(whole, _one_of_each(whole), root / f"{name} pruned", {})
        asked[name], asked[f"{name} pruned"] = questions(whole, root / f"{name} pruned", pruned)
    stored = {name: dict(asked[name].weights) for name in ("llama", "olmo2")}
    del stored["llama"][LOST]
    stored["olmo2"]["model.odd.weight"] = [3, 2]
    asked |= {f"{name} otherwise": replace(asked[name], weights=weights) for name, weights in stored.items()}
    engines = [EngineSettings(**PLAIN | changes) for changes in ENGINES.values()]
    found = vllm_foresight.ask(list(asked.values()), engines)
    return {name: dict(zip(ENGINES, answer.refusals, strict=True)) for name, answer in zip(asked, found, strict=True)}


def refused(answer: dict[str, str | None]) -> set[str]:
    return {engine for engine, refusal in answer.items() if refusal is not None}


def test_vllm_says_which_settings_it_will_not_start_with(answers):
    for name in ("llama", "llama pruned"):
        assert refused(answers[name]) - {"small cache"} == {"long", "three ranks"}
        assert "max_model_len (300) is greater than the derived max_model_len" in answers[name]["long"]
        assert "(4) must be divisible by tensor parallel size (3)" in answers[name]["three ranks"]
    for name in ("gemma2", "gemma2 pruned"):
        assert "does not support float16" in answers[name]["float16"]


def test_a_sequence_that_does_not_fit_the_cache_is_found(answers):
    assert answers["llama"]["small cache"] == (
        "a sequence of max_model_len 256 takes 0.000488 GiB of KV cache, and kv_cache_gib 0.00061 holds 128 tokens: "
        "set one higher or the other lower"
    )
    assert answers["llama pruned"]["small cache"] is None


def test_vllm_says_which_models_it_will_not_serve(answers):
    assert answers["small heads"]["plain"].startswith("CPU_ATTN has no kernel for heads of size 16, only for those of")
    for name in ("mamba", "mamba pruned"):
        assert answers[name]["plain"] == "its build for CPUs has no kernel for the scan of Mamba's state space model"
    for name in ("qwen3_next", "qwen3_next pruned"):
        assert answers[name]["plain"] == "its build for CPUs computes gated delta nets in bfloat16 alone"
        assert answers[name]["bfloat16"] is None
    assert refused(answers["stablelm pruned"]) == refused(answers["stablelm"])
    assert answers["olmo2"]["two stages"] is None
    assert "use tensor_parallel_size" in answers["olmo2 pruned"]["two stages"]
    assert answers["helium"]["plain"] is None
    assert answers["helium pruned"]["plain"].endswith("['FinerCutHeliumForCausalLM'] are not supported for now.")
    assert answers["gpt2"]["plain"] == "AssertionError: assert not config.scale_attn_by_inverse_layer_idx"


def test_weights_that_vllm_does_not_take_pass_over_or_lacks_are_found(answers):
    for name in ("bloom", "bloom pruned"):
        assert answers[name]["plain"] == (
            "its model does not take lm_head.weight of shape (400, 128): There is no module or parameter named "
            "'lm_head' in BloomModel"
        )
    assert "take model.odd.weight of shape (3, 2): There is no module" in answers["olmo2 otherwise"]["plain"]
    blocks = [f"model.layers.{block}.self_attn.o_proj.bias" for block in range(3)]
    for name in ("qwen3", "qwen3 pruned"):
        assert answers[name]["plain"] == (
            f"its model makes no use of {', '.join(blocks)}, which transformers computes with"
        )
    assert answers["llama otherwise"]["plain"] == f"its model has {LOST}, which the checkpoint has not"


def test_shared_memory_too_small_for_an_engine_is_found(tmp_path, tokenizer):
    random_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ask = (
        "import sys, pathlib; from finercut.serving import foresight, settings;"
        "engine = settings.EngineSettings.model_validate_json(sys.argv[2]);"
        "asked = foresight.Asked(pathlib.Path(sys.argv[1]), {}, []);"
        "print(foresight.ask([asked], [engine])[0].refusals[0])"
    )
    command = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", sys.executable, "-c", ask, tmp_path, json.dumps(PLAIN)],
        capture_output=True,
        text=True,
        check=True,
    )
    # vLLM's ring of ten chunks of 24 MiB.
    assert "Insufficient space in /dev/shm" in done.stdout
    assert "240 MiB required, 64 MiB free" in done.stdout


def test_vllm_says_what_it_lacks_for_models_with_vision(answers):
    needed = None
    if find_spec("torchvision") is None:
        needed = "its model imports torchvision, which is not installed here: add the build that goes with torch "
        needed += f"{torch.__version__}, see docs/families.md"
    for name in ("gemma3", "gemma3 pruned"):
        assert answers[name]["plain"] == needed
    for name in ("smolvlm", "smolvlm pruned"):
        assert answers[name]["plain"] is None


@pytest.fixture
def chosen(workspace):
    return params.load()


def asked(monkeypatch, *refusals: list[str | None]) -> list[int]:
    """Let vLLM say so of the whole and of the pruned model; how often it was asked."""
    times = []

    def ask(models, engines):
        times.append(len(engines))
        return [Answer(list(each[: len(engines)]), None) for each in refusals]

    monkeypatch.setattr(vllm_foresight, "ask", ask)
    return times


def test_what_was_answered_well_is_not_asked_again_unless_something_changed(chosen, monkeypatch):
    model = ModelDirectory(paths.MODEL)
    times = asked(monkeypatch, [None] * 3, [None] * 3)
    assert foresight.check(chosen, model) == foresight.check(chosen, model) == []
    assert times == [2]
    tolerant = chosen.prove.model_copy(update={"logit_tolerance": 0.5})
    assert foresight.check(chosen.model_copy(update={"prove": tolerant}), model) == []
    assert times == [2]
    divided = chosen.prove.model_copy(update={"tensor_parallel_size": 2})
    assert foresight.check(chosen.model_copy(update={"prove": divided}), model) == []
    assert times == [2, 3]
    (paths.MODEL / "generation_config.json").write_text("{}")
    model = ModelDirectory(paths.MODEL)
    foresight.check(chosen, model)
    assert times == [2, 3, 2]
    # The same workspace on another machine.
    libraries = dict.fromkeys(("torch", "transformers", "tokenizers", "lm_eval", "vllm"))
    Environment(**libraries, hardware="NVIDIA T4").write(paths.ENVIRONMENT)
    foresight.check(chosen, model)
    assert times == [2, 3, 2, 2]


def test_settings_that_vllm_refuses_are_an_error_and_a_model_that_it_refuses_is_in_the_way(chosen, monkeypatch, caplog):
    model = ModelDirectory(paths.MODEL)
    asked(monkeypatch, [None, None], [None, "float16 overflows"])
    with pytest.raises(ValueError, match="vLLM does not serve the model less some sublayers as throughput .*overflows"):
        foresight.check(chosen, model)
    times = asked(monkeypatch, [None, None], ["no such architecture", None])
    for _ in range(2):
        (obstacle,) = foresight.check(chosen, model)
        assert "cannot be registered" in obstacle
        assert obstacle.endswith("no such architecture")
    assert times == [2, 2]
    assert f"fetch: LATER STAGES WILL FAIL: {obstacle}" in caplog.text
    with pytest.raises(RuntimeError, match="cannot be registered"):
        flow._foresee(chosen)


def test_without_vllm_fetch_says_what_was_not_checked(chosen, without_vllm, caplog):
    assert fetch.run(chosen).n_blocks == 4
    assert "whether vLLM serves the model was not checked" in caplog.text
    assert "pip install 'finercut[cuda]'" in caplog.text


def evaluating(chosen, *tasks: dict, **changes):
    tasks = [Task(**task) for task in tasks]
    return chosen.model_copy(update={"evaluate": chosen.evaluate.model_copy(update={"tasks": tasks, **changes})})


def test_tasks_that_cannot_be_evaluated_are_found(chosen, monkeypatch):
    asked(monkeypatch, [None, None], [None, None])
    model = ModelDirectory(paths.MODEL)
    with pytest.raises(ValueError, match="finercut_agreement has no metric 'bleu'"):
        foresight.check(evaluating(chosen, {"name": "finercut_agreement", "metric": "bleu"}), model)
    answers = {"name": "finercut_copying", "metric": "exact_match"}
    assert foresight.check(evaluating(chosen, answers), model) == []
    model.tokenizer.eos_token = None
    paths.FORESEEN.unlink()
    with pytest.raises(ValueError, match="lm-eval cannot run finercut_copying with the model's tokenizer"):
        foresight.check(evaluating(chosen, answers), model)


def test_a_prompt_that_leaves_no_context_to_write_in_is_refused(chosen, monkeypatch):
    asked(monkeypatch, [None, None], [None, None])
    model = ModelDirectory(paths.MODEL)
    samples = Samples(prompts=["a b"], n_tokens=model.language.max_position_embeddings)
    with pytest.raises(ValueError, match="evaluate.samples: a prompt and n_tokens are"):
        foresight.check(evaluating(chosen, samples=samples), model)


@pytest.mark.parametrize("where", ["heal", "search"])
def test_a_refit_of_parallel_blocks_is_refused(chosen, tmp_path, where):
    random_model("gpt_neox", use_parallel_residual=True).save_pretrained(tmp_path / "parallel")
    heal = Refit(method="refit", ridges=[0.1], fractions=[1.0], batch_tokens=64, dtype="auto", device="cpu")
    search = chosen.search.model_copy(update={"refit": Refitting()})
    changes = {"heal": heal} if where == "heal" else {"search": search}
    with pytest.raises(ValueError, match="refit cannot fit a gpt_neox model"):
        foresight.check(chosen.model_copy(update=changes), ModelDirectory(tmp_path / "parallel"))


def test_a_reconstruction_is_refused_where_blocks_hand_on_more_than_the_stream(chosen, tmp_path):
    model_type, changes = SHARED["gemma3n"]
    random_model(model_type, **changes).save_pretrained(tmp_path / "sharing")
    heal = Reconstruct(
        method="reconstruct",
        sublayers="all",
        ridges=[0.1],
        steps=2,
        warm_up=0.1,
        seed=0,
        batch_tokens=64,
        learning_rate=1e-4,
        eval_every=1,
        fractions=[1.0],
        dtype="auto",
        device="cpu",
    )
    with pytest.raises(ValueError, match="hand on more than the residual stream.*set heal.method to distill"):
        foresight.check(chosen.model_copy(update={"heal": heal}), ModelDirectory(tmp_path / "sharing"))


def test_a_device_that_is_not_here_is_in_the_way(chosen, monkeypatch):
    asked(monkeypatch, [None, None], [None, None])
    (obstacle,) = foresight.check(evaluating(chosen, device="cuda:9"), ModelDirectory(paths.MODEL))
    assert obstacle.startswith("evaluate.device: no device 'cuda:9' here")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protect": ["77.block"]}, "search: .*77.block"),
        ({"n_processes": 50}, "search: search.n_processes = 50 cannot share"),
        ({"continuation_tokens": 10**6}, "search: search.continuation_tokens = 1000000: after"),
        ({"removals": 99}, "search: search.removals = 99: cannot remove 99 of"),
        ({"divergence": "task", "task": "missing.jsonl"}, "search: .*missing.jsonl"),
    ],
)
def test_what_the_search_will_refuse_is_said_before_anything_is_measured(chosen, monkeypatch, changes, said):
    asked(monkeypatch, [None, None], [None, None])
    search = chosen.search.model_copy(update=changes)
    (obstacle,) = foresight.check(chosen.model_copy(update={"search": search}), ModelDirectory(paths.MODEL))
    assert re.match(said, obstacle)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_of_a_search_takes_a_gpu_of_its_own(chosen, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    search_job._check_devices(chosen.search.model_copy(update={"n_processes": 2, "device": device}))
    with pytest.raises(ValueError, match=r"^search.n_processes = 3: each takes a GPU, and here are 2: lower it"):
        search_job._check_devices(chosen.search.model_copy(update={"n_processes": 3, "device": device}))


def test_a_context_that_leaves_nothing_to_compare_is_refused(chosen, without_vllm):
    file = Path("mine/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 17}))
    before = paths.report("fetch").read_bytes()
    with pytest.raises(ValueError, match="context of 17 tokens is too short to compare vLLM with transformers"):
        fetch.run(evaluating(chosen, samples=Samples(prompts=["a b"], n_tokens=1)))
    assert paths.report("fetch").read_bytes() == before
