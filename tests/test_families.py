"""Every family against transformers' own, unmodified code with the same sublayers masked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES, N_BLOCKS, OTHERS, SHARED, UNDECLARED, each, random_model, run_without_finercut
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StaticCache, pipeline

from finercut.checkpoint.writing import write_pruned
from finercut.model.checks import check_sizes
from finercut.model.configs import NO_LIMIT, context_of
from finercut.model.families import FAMILIES, LAYOUT_KEY, Layout, check_supported, layout_of
from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.selection.greedy import search
from finercut.sublayers import Sublayer, candidates, parse

TOLERANCE = 2e-5  # of logits whose spread is about 1
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def sublayers(*names: str) -> list[Sublayer]:
    return [s for name in names for s in parse(name).sublayers]


# Windowed attentions are in blocks 0 and 2 where a family alternates.
REMOVALS = {
    "first attention": sublayers("0.attention"),
    "last mlp": sublayers("3.mlp"),
    "whole blocks": sublayers("0.block", "2.block"),
    "all windowed attention": sublayers("0.attention", "2.attention", "1.mlp"),
    "all attention without a window": sublayers("1.attention", "3.attention", "2.mlp"),
    "all attention but one": sublayers("0.attention", "1.attention", "3.attention"),
}
CACHES = ({}, {"use_cache": False}, {"cache_implementation": "static"})
"""How a pruned model continues prompts greedily; sampled, as in the first."""
MIXED = sublayers("0.block", "1.mlp", "3.attention")


@dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    changes: dict[str, Any]
    directory: Path
    """Of the whole model."""
    model: Any
    """The whole model."""

    @property
    def layout(self) -> Layout:
        return layout_of(self.model.config)

    def pruned(self, removed: list[Sublayer], directory: Path) -> Any:
        directory.mkdir()
        write_pruned(self.directory, removed, directory, {"source": self.name}, "# card\n")
        return as_in_tests(load_pruned(directory, torch.float32))


def as_in_tests(model: Any) -> Any:
    """With the attention that knows soft caps; a checkpoint does not say which one it is run with."""
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", params=each(CASES | UNDECLARED))
def case(request, tmp_path_factory, tokenizer) -> Case:
    model_type, changes = (CASES | UNDECLARED)[request.param]
    directory = tmp_path_factory.mktemp("families") / "whole"
    model = random_model(model_type, **changes)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=True, top_k=17)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return Case(request.param, model_type, changes, directory, as_in_tests(load_whole(directory, torch.float32)))


@pytest.fixture(scope="module")
def pruned(case, tmp_path_factory) -> Any:
    """The model less `MIXED`; read it, do not change it."""
    return case.pruned(MIXED, tmp_path_factory.mktemp("pruned") / "pruned")


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Two prompts longer than the window, the first one padded on the left."""
    ids = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[0, :4] = 2
    return {"input_ids": ids, "attention_mask": (ids != 2).long()}


def test_every_family_has_its_case():
    assert {model_type for model_type, _ in (CASES | SHARED | OTHERS).values()} >= set(FAMILIES)


def difference(a: Any, b: Any) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("kinds", ["both", "blocks"])
def test_the_search_gives_the_divergences_of_masking(case, tokens, kinds):
    tokens = tokens[:2]
    whole = case.model(tokens).logits
    gone: set[Sublayer] = set()
    for removal in search(case.model, tokens, tokens, n_removals=2, kinds=kinds, mode="brute"):
        expected = {
            str(c): _mean_js(case, whole, tokens, gone | set(c.sublayers))
            for c in candidates(N_BLOCKS, kinds)
            if gone.isdisjoint(c.sublayers)
        }
        assert min(expected.values()) > 1e-3, "a sublayer that does not matter proves nothing"
        assert removal.values == pytest.approx(expected, rel=1e-4, abs=1e-6)
        gone.update(sublayers(removal.sublayer))


def _mean_js(case: Case, whole: torch.Tensor, tokens: torch.Tensor, gone: set[Sublayer]) -> float:
    with masked(case.model, gone):
        p, q = whole.log_softmax(-1), case.model(tokens).logits.log_softmax(-1)
    m = ((p.exp() + q.exp()) / 2).log()
    return (((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2).mean().item()


def test_a_pruned_model_is_the_masked_whole_one(case, tokens, prompts, tmp_path, record_property):
    largest = 0.0
    for name, removed in REMOVALS.items():
        pruned = case.pruned(removed, tmp_path / name)
        with masked(case.model, removed), torch.no_grad():
            of_whole, of_pruned = case.model(tokens).logits, pruned(tokens).logits
            largest = max(largest, difference(of_whole, of_pruned))
            assert largest <= TOLERANCE, f"{name}: logits differ by {largest}"
            _check_cache(case, pruned, removed, tokens[:2], of_pruned[:2], name)
            for sampled in (False, True):
                expected = _generate(case.model, prompts, sampled)
                for cache in CACHES[:1] if sampled else CACHES:
                    found = _generate(pruned, prompts, sampled, **cache)
                    assert torch.equal(found, expected), f"{name}: sampled={sampled}, {cache}"
            alone = {"input_ids": prompts["input_ids"][:1, 4:], "attention_mask": prompts["attention_mask"][:1, 4:]}
            together = _generate(pruned, prompts, sampled=False)[0, 4:]
            assert torch.equal(_generate(pruned, alone, sampled=False)[0], together), f"{name}: padding"
    record_property("largest_logit_difference", largest)


def _generate(model: Any, prompts: dict[str, torch.Tensor], sampled: bool, **settings: Any) -> torch.Tensor:
    torch.manual_seed(0)
    settings |= {"do_sample": True, "temperature": 1.5} if sampled else {"do_sample": False}
    return model.generate(**prompts, max_new_tokens=6, min_new_tokens=6, **settings)


def _check_cache(case: Case, pruned: Any, removed: list[Sublayer], tokens: Any, logits: Any, name: str) -> None:
    """A prompt beyond the window, then two steps beyond it; the cache has a layer, of its kind, an attention."""
    output = pruned(tokens[:, :10], use_cache=True)
    parts = [output.logits]
    for step in (tokens[:, 10:20], tokens[:, 20:21], tokens[:, 21:]):
        output = pruned(step, past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
    assert difference(torch.cat(parts, 1), logits) <= TOLERANCE, f"{name}: cached"
    kept = [i for i in range(N_BLOCKS) if Sublayer(i, "attention") not in removed]
    kinds = getattr(case.model.config, "layer_types", None)
    windowed = getattr(case.model.config, "sliding_window", None) is not None
    expected = [kinds[i] == "sliding_attention" if kinds else windowed for i in kept]
    for cache in (output.past_key_values, StaticCache(config=pruned.config, max_cache_len=32)):
        assert cache.is_sliding == expected, f"{name}: layers of the cache"
    assert output.past_key_values.get_seq_length() == tokens.shape[1]


def test_removed_weights_are_gone_and_the_rest_is_as_it_was(case, pruned):
    left = load_file(Path(pruned.config.name_or_path) / "model.safetensors")
    before = load_file(case.directory / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in left.items())
    gone = sum(
        parameter.numel()
        for s in MIXED
        for member in case.layout.branch(s.kind, s.block).members
        for parameter in case.model.get_submodule(f"{case.layout.blocks}.{s.block}.{member}").parameters()
    )
    assert gone > 0
    assert sum(t.numel() for t in left.values()) == sum(t.numel() for t in before.values()) - gone


def test_saving_and_loading_again_changes_nothing(pruned, tokens, tmp_path):
    pruned.save_pretrained(tmp_path)
    again = as_in_tests(AutoModelForCausalLM.from_pretrained(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, pruned(tokens).logits)
    for name in ("config.json", "generation_config.json", "modeling_finercut.py"):
        assert (tmp_path / name).read_bytes() == (Path(pruned.config.name_or_path) / name).read_bytes()


def test_what_comes_with_the_whole_model_comes_with_the_pruned_one(case, pruned):
    directory = Path(pruned.config.name_or_path)
    ties = case.model.config.tie_word_embeddings
    assert (pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight) == ties
    assert pruned.generation_config.top_k == 17
    ours, theirs = AutoConfig.from_pretrained(directory).to_dict(), case.model.config.to_dict()
    added = {LAYOUT_KEY, "model_type", "architectures", "auto_map", "finercut", "per_layer_config"}
    assert {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)} <= added | {"_name_or_path"}
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hm"}], tokenize=False) == "user: Hm\n"


def test_a_bfloat16_model_stays_one(case, tmp_path):
    whole, there = tmp_path / "whole", tmp_path / "pruned"
    random_model(case.model_type, **case.changes).to(torch.bfloat16).save_pretrained(whole)
    there.mkdir()
    write_pruned(whole, MIXED, there, {}, "")
    assert {t.dtype for t in load_file(there / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(there).parameters()} == {torch.bfloat16}


def test_a_text_generation_pipeline_runs(pruned, tokenizer):
    generator = pipeline("text-generation", model=pruned, tokenizer=tokenizer)
    prompt = "The river rises in the mountains"
    found = generator(prompt, max_new_tokens=5, do_sample=False, return_full_text=True)[0]["generated_text"]
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = pruned.generate(ids, max_new_tokens=5, do_sample=False)[0]
    assert found == tokenizer.decode(expected, skip_special_tokens=True)


def test_gradients_reach_every_weight_and_lora_trains(case, tokens, tmp_path):
    from peft import LoraConfig, get_peft_model

    pruned = case.pruned(MIXED, tmp_path / "pruned").train()
    pruned(tokens, labels=tokens).loss.backward()
    unreached = [n for n, p in pruned.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # A norm that both sublayers read stays where a whole block is gone.
    assert [n for n in unreached if not n.startswith(f"{case.layout.blocks}.0.")] == []
    assert not unreached or case.name in UNDECLARED
    pruned.zero_grad()
    tuned = get_peft_model(pruned, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = tuned(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]


# Runs where finercut cannot be imported.
WITHOUT_FINERCUT = """
import sys
sys.modules["finercut"] = None
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
for directory in map(Path, sys.argv[2:]):
    try:
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
        print("refused", directory.name)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    model.save_pretrained(directory / "again")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        torch.save(model(tokens).logits, directory / "logits.pt")
"""


def test_without_finercut_every_family_loads_by_its_own_file_or_is_refused(tokens, tmp_path):
    directories = []
    for number, (model_type, changes) in enumerate((CASES | UNDECLARED).values()):
        whole, directory = tmp_path / f"whole-{number}", tmp_path / f"pruned-{number}"
        random_model(model_type, **changes).save_pretrained(whole)
        directory.mkdir()
        write_pruned(whole, MIXED, directory, {}, "")
        directories.append(directory)
    said = run_without_finercut(WITHOUT_FINERCUT, tmp_path, tokens[:1], directories)
    for name, directory in zip(CASES | UNDECLARED, directories, strict=True):
        assert f"refused {directory.name}\n" in said, name
        for again in (directory, directory / "again"):
            model = as_in_tests(load_pruned(again, torch.float32))
            with torch.no_grad():
                assert torch.equal(torch.load(directory / "logits.pt"), model(tokens[:1]).logits), name


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_routers_that_are_left_balance_their_experts(model_type, tokens, tmp_path):
    """Search, training loss and the checkpoint, of a model that asks for its routers' logits."""
    changes = CASES[model_type][1] | {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    random_model(model_type, **changes).save_pretrained(tmp_path / "whole")
    removed = sublayers("0.mlp", "3.block")
    (tmp_path / "pruned").mkdir()
    write_pruned(tmp_path / "whole", removed, tmp_path / "pruned", {}, "")
    whole, pruned = (load(tmp_path / n, torch.float32) for load, n in ((load_whole, "whole"), (load_pruned, "pruned")))
    assert len(list(search(whole, tokens[:1], tokens[:1], n_removals=1))) == 1
    with masked(whole, removed), torch.no_grad():
        expected, found = whole(tokens, labels=tokens), pruned(tokens, labels=tokens)
    # 1.mlp is a plain one in the Qwen model.
    kept = [logits for i, logits in zip(_routed(model_type), expected.router_logits, strict=True) if i in (1, 2)]
    assert len(found.router_logits) == len(kept)
    assert all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(found.router_logits, kept, strict=True))
    without = expected.loss - 0.5 * expected.aux_loss
    assert found.loss - 0.5 * found.aux_loss == pytest.approx(without.item(), abs=1e-4)
    assert found.aux_loss > 0


def _routed(model_type: str) -> list[int]:
    return [i for i in range(N_BLOCKS) if i not in CASES[model_type][1].get("mlp_only_layers", [])]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("bart", {}, "an encoder and a decoder"),
        (
            "llama",
            {"quantization_config": {"quant_method": "hqq"}},
            r"quantised \(hqq\): take the model it was made from.*; fetch dequantises awq",
        ),
        ("llama", {"per_layer_config": {"1": {"intermediate_size": 8}}}, "does not read it"),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(model_type, changes, message):
    config = AutoConfig.for_model(model_type, **changes)
    with pytest.raises(ValueError, match=message):
        check_supported(config)
    with pytest.raises(ValueError, match=f"cannot prune a {model_type} model"):
        layout_of(config)


@pytest.mark.parametrize(
    ("model_type", "changes", "context"),
    [
        ("gpt2", {"n_positions": 77}, 77),
        ("mpt", {"max_seq_len": 77}, 77),
        ("bloom", {"seq_length": 77}, 77),
        ("bloom", {}, NO_LIMIT),
        ("finercut_mamba", {}, NO_LIMIT),
    ],
)
def test_a_model_whose_config_has_no_context_reads_whatever_it_is_given(model_type, changes, context):
    config = AutoConfig.for_model(model_type, **changes)
    assert context_of(config) == context
    check_sizes(config)


def test_a_layout_written_by_hand_is_taken_and_a_wrong_one_refused():
    written = layout_of(AutoConfig.for_model("llama")).to_dict()
    config = AutoConfig.for_model("cohere", **{LAYOUT_KEY: json.loads(json.dumps(written))})
    assert layout_of(config).to_dict() == written
    with pytest.raises(ValueError, match="finercut_layout in config.json is not a layout: 'mlp'. Write it as"):
        layout_of(AutoConfig.for_model("cohere", **{LAYOUT_KEY: {"blocks": "x", "attention": {"core": "y"}}}))
