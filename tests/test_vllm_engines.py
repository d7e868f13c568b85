"""Every family less some sublayers, in vLLM's engines, beside the masked whole model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import family_engines
import pytest
import torch
from family_models import ALIKE, CASES, N_BLOCKS
from multimodal_models import TEXT_AND_PICTURE, add_processor, picture, random_wrapper
from quantised_checkpoints import quantise_by_hand, settings
from transformers import AutoProcessor
from vllm_cases import REMOVED, TOLERANCE, model_for_vllm, sublayers, write

from finercut.model.directory import ModelDirectory
from finercut.model.layouts import note_layout
from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.serving.claim import mean_difference
from finercut.serving.vllm_engine import N_GENERATED, Continuation, largest_difference
from finercut.sublayers import Sublayer

ONE_ATTENTION_LEFT = sublayers("0.block", "1.attention", "3.attention")
# Windowed attentions are in blocks 0 and 2 where a family alternates.
NO_WINDOW_LEFT = sublayers("0.attention", "2.attention", "1.mlp")
ONLY_WINDOWS_LEFT = sublayers("1.attention", "3.attention", "2.mlp")
ALTERNATING = ("gemma2", "gemma3_text")
# Every attention has a window.
WINDOWED = ("mistral", "phi3", "mixtral", "qwen3_moe")
# vLLM's blocks differ in how they add to the residual stream, which the first of them begins: one family of each way.
FIRST_BLOCKS = ("llama", "gemma2", "granite", "olmo2", "gpt_neox", "gpt2", "opt post-norm", "mixtral")
# A language model inside another, which vLLM serves without torchvision.
INSIDE = "idefics3"
RUNS = [
    *((case, REMOVED) for case in CASES),
    *((case, ONE_ATTENTION_LEFT) for case in FIRST_BLOCKS),
    *(("gemma3_text", removed) for removed in (NO_WINDOW_LEFT, ONLY_WINDOWS_LEFT)),
    *((case, []) for case in ("llama", "gemma2")),
    (INSIDE, REMOVED),
]
# Where another family's engine says as much. Of a windowed one both kinds of attention are left elsewhere.
FOR_THE_MATRIX = [
    *((case, REMOVED) for case in CASES if case in ALIKE),
    *((case, ONE_ATTENTION_LEFT) for case in ("granite", "olmo2", "gpt_neox", "mixtral")),
    ("llama", []),
]
OLD = Path(__file__).parent / "fixtures/v0_1/checkpoint"
SEEING = f"{INSIDE} with a processor"
# Of inputs rounded to integers, in the range that does not overflow without VNNI.
ROUNDING = "llama in w7a8"


def names(removed: list[Sublayer]) -> str:
    return " ".join(map(str, removed)) or "whole"


def run_id(run: tuple[str, list[Sublayer]]) -> str:
    return f"{run[0]}-{names(run[1])}"


each_run = pytest.mark.parametrize(
    "run",
    [pytest.param(run, marks=[pytest.mark.matrix] if run in FOR_THE_MATRIX else [], id=run_id(run)) for run in RUNS],
)


@dataclass(frozen=True)
class Served:
    """What an engine made of a model."""

    model: Any
    """The whole one."""
    continuations: list[Continuation]
    n_cached: list[int]
    """Tokens of each prompt given again that it had in its cache."""
    n_blocks: int
    """Of its KV cache."""
    seen: Continuation | None
    """Of a text with an image in it."""


# Longer than any window, than what is done at once, and than two blocks of the cache; of the tokens that OLD has.
PROMPTS = torch.randint(3, 280, (3, 70), generator=torch.Generator().manual_seed(1))
# Begins as the first one does, beyond its first block in the cache.
PROMPTS[2, :40] = PROMPTS[0, :40]


@pytest.fixture(scope="module")
def served(request, tmp_path_factory) -> dict[tuple[str, str], Served]:
    """What an engine each made of OLD, of SEEING, of ROUNDING and of what tests ask of RUNS.

    Of two prompts, then of two of known beginning.
    """
    asked_for = [item.callspec.params.get("run") for item in request.session.items if hasattr(item, "callspec")]
    runs = [run for run in RUNS if run in asked_for]
    root = tmp_path_factory.mktemp("families")
    prompts = {"prompts": PROMPTS[:2].tolist(), "again": PROMPTS[[0, 2]].tolist()}
    command = [sys.executable, family_engines.__file__, json.dumps(prompts)]
    models = {case: random_wrapper(case) if case == INSIDE else model_for_vllm(case) for case in dict(runs)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engines:
        # Meanwhile it imports vLLM.
        for case, removed in runs:
            print(write(models[case], removed, root / case / names(removed)), file=engines.stdin, flush=True)
        print(OLD, file=engines.stdin)
        random_wrapper(INSIDE).save_pretrained(root / SEEING / "whole model")
        add_processor(root / SEEING / "whole model")
        print(write(None, REMOVED, root / SEEING / names(REMOVED)), file=engines.stdin)
        rounding = write(model_for_vllm("llama"), REMOVED, root / ROUNDING / names(REMOVED))
        quantise_by_hand(rounding, settings("w7a8"))
        print(rounding, file=engines.stdin)
        engines.stdin.close()
        answers = [json.loads(line) for line in engines.stdout]
    asked = [*((case, names(removed)) for case, removed in runs), ("old", ""), (SEEING, names(REMOVED)), (ROUNDING, "")]
    found = dict(zip(asked, answers, strict=True))
    assert {run: answer["error"] for run, answer in found.items() if "error" in answer} == {}
    models["old"] = load_pruned(OLD, torch.float32)
    models[ROUNDING] = load_pruned(rounding, torch.float32)
    models[INSIDE] = models[SEEING] = load_whole(note_layout(ModelDirectory(root / SEEING / "whole model")))
    return {
        (case, removed): Served(
            models[case],
            [continuation(c) for c in answer["continuations"]],
            answer["n_cached"],
            answer["n_blocks"],
            continuation(answer["seen"]) if answer["seen"] else None,
        )
        for (case, removed), answer in found.items()
    }


def continuation(answer: dict) -> Continuation:
    logprobs = [{int(token): nats for token, nats in given.items()} for given in answer["logprobs"]]
    return Continuation(answer["tokens"], logprobs)


def test_an_engine_computes_what_a_checkpoint_of_version_0_1_does(served):
    old = served["old", ""]
    assert largest_difference(old.continuations, old.model) < TOLERANCE


def test_an_engine_rounds_inputs_as_the_model_with_rounded_inputs_does(served, record_property):
    one = served[ROUNDING, ""]
    mean, by_rounding = mean_difference(one.continuations, one.model, "float32")
    record_property("mean_logprob_difference", mean)
    assert mean < 1.25 * by_rounding + TOLERANCE
    wrong = one.model.model.layers[2].mlp.down_proj
    wrong.weight.data *= 1.05
    assert mean_difference(one.continuations, one.model, "float32")[0] > 1.25 * by_rounding + TOLERANCE


@dataclass
class Looking:
    """A model that is shown an image with every prompt."""

    model: Any
    inputs: dict[str, torch.Tensor]
    """Of its processor, for a prompt that the given tokens begin with."""
    device = "cpu"

    def __call__(self, tokens: torch.Tensor, **settings: Any) -> Any:
        prompt = self.inputs["input_ids"]
        assert torch.equal(tokens[:, : prompt.shape[1]], prompt)
        return self.model(tokens, pixel_values=self.inputs["pixel_values"], **settings)


def test_an_engine_sees_what_the_masked_whole_model_does(served, record_property):
    one = served[SEEING, names(REMOVED)]
    processor = AutoProcessor.from_pretrained(one.model.config.name_or_path)
    inputs = dict(processor(text=TEXT_AND_PICTURE, images=picture(), return_tensors="pt"))
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    with masked(one.model, REMOVED):
        assert largest_difference(one.continuations, one.model) < TOLERANCE
        difference = largest_difference([one.seen], Looking(one.model, inputs))
        record_property("largest_logprob_difference", difference)
        assert difference < TOLERANCE
        assert largest_difference([one.seen], Looking(one.model, other)) > 100 * TOLERANCE


@each_run
def test_engines_compute_what_masked_whole_models_do(served, run, record_property):
    case, removed = run
    one = served[case, names(removed)]
    assert [c.tokens[:70] for c in one.continuations] == PROMPTS[[0, 1, 0, 2]].tolist()
    assert {len(c.tokens) for c in one.continuations} == {70 + N_GENERATED}
    with masked(one.model, removed):
        difference = largest_difference(one.continuations, one.model)
    record_property("largest_logprob_difference", difference)
    assert difference < TOLERANCE
    with masked(one.model, removed[1:] or sublayers("0.mlp")):
        assert largest_difference(one.continuations, one.model) > 100 * TOLERANCE


@each_run
def test_the_kv_cache_has_room_for_kept_attentions_only(served, run):
    case, removed = run
    one = served[case, names(removed)]
    kept = [i for i in range(N_BLOCKS) if Sublayer(i, "attention") not in removed]
    n_kv_heads = 4 if case.startswith(("gpt", "opt")) else 2
    layer_bytes = 2 * family_engines.BLOCK * n_kv_heads * 32 * 4  # keys and values, heads of 32 float32
    # Where attentions with and without a window are left, they take turns in the memory of the fewer ones.
    windowed = [i for i in kept if i % 2 == 0] if case in ALTERNATING else kept
    n_layers = min(len(windowed), len(kept) - len(windowed)) or len(kept)
    assert one.n_blocks == family_engines.KV_CACHE_BYTES // (n_layers * layer_bytes)
    # Whole blocks of what is known; the last token is always computed. A beginning that all windows have left is gone.
    assert one.n_cached == [64, 0 if case in WINDOWED or (case in ALTERNATING and windowed) else 32]
