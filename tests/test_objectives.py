"""Searches that keep something else low than a divergence of outputs, against transformers' own outputs."""

import json

import pytest
import torch
from conftest import random_llama
from test_baselines import streams
from torch.nn.functional import cross_entropy

from finercut.model.masking import masked
from finercut.selection.bench import Bench
from finercut.selection.examples import read_examples
from finercut.selection.greedy import search
from finercut.sublayers import candidates, parse


@pytest.fixture(scope="module")
def model():
    return random_llama()


def along(model, tokens):
    """(windows, tokens, hidden) stream after each sublayer."""
    blocks, between = streams(model, tokens)
    return [s for pair in zip(between, blocks[1:], strict=True) for s in pair]


def distance(model, tokens, whole, removed):
    with masked(model, [s for c in removed for s in c.sublayers]):
        pruned = along(model, tokens)
    parts = [
        ((p - w).double().square().sum(-1) / w.double().square().sum(-1)).mean()
        for w, p in zip(whole, pruned, strict=True)
    ]
    return (sum(parts) / len(parts)).item()


def brute_force(n_removals, value):
    """Removals and the values of all candidates at each step."""
    gone, steps = [], []
    for _ in range(n_removals):
        values = {c: value([*gone, c]) for c in candidates(4) if c not in gone}
        gone.append(min(values, key=lambda c: (values[c], c)))
        steps.append({str(c): v for c, v in values.items()})
    return [str(c) for c in gone], steps


@pytest.mark.parametrize("mode", ["brute", "exact", "lazy"])
def test_trajectory_is_the_mean_distance_of_hidden_states_along_the_depth(model, tokens, mode):
    whole = along(model, tokens[:4])
    removals, steps = brute_force(3, lambda gone: distance(model, tokens[:4], whole, gone))
    found = list(search(model, tokens[:4], tokens[4:], 3, divergence="trajectory", mode=mode))
    assert [r.sublayer for r in found] == removals
    for step, removal in zip(steps, found, strict=True):
        assert removal.values == pytest.approx({name: step[name] for name in removal.values}, rel=1e-4)
        assert len(removal.values) == len(step) if mode == "brute" else len(removal.values) < len(step)
    whole = along(model, tokens[4:])
    gone = list(map(parse, removals))
    assert found[-1].held_out_divergence == pytest.approx(distance(model, tokens[4:], whole, gone), rel=1e-4)
    assert (
        list(search(model, tokens[:4], tokens[4:], 3, divergence="trajectory", mode=mode, earlier=found[:1]))
        == found[1:]
    )


def test_distances_along_the_depth_follow_what_is_put_back(model, tokens):
    with Bench(model, tokens[:4], tokens[4:], "trajectory") as bench:
        bench.remove(parse("1.mlp").sublayers)
        before = bench.state()
        one = bench.divergence_now()
        bench.remove(parse("0.mlp").sublayers)
        both = bench.divergence_now()
        bench.return_to(before)
        assert bench.divergence_now() == one != both
        bench.restore(parse("1.mlp").sublayers)
        assert bench.divergence_now() == 0


def test_perplexity_is_the_negative_log_likelihood_of_the_text(model, tokens):
    def loss(gone):
        with torch.no_grad(), masked(model, [s for c in gone for s in c.sublayers]):
            logits = model(tokens[:4]).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), tokens[:4, 1:].flatten()).item() * 23 / 24

    removals, steps = brute_force(3, loss)
    found = list(search(model, tokens[:4], tokens[4:], 3, divergence="perplexity", mode="brute"))
    assert [r.sublayer for r in found] == removals
    assert found[2].values == pytest.approx(steps[2], rel=1e-4)
    assert [r.sublayer for r in search(model, tokens[:4], tokens[4:], 3, divergence="perplexity")] == removals


EXAMPLES = [
    {"prompt": "The river rises in", "answer": "the north"},
    {"prompt": "Coffee made the port", "choices": ["poor", "rich", "small"], "answer": 1},
    {"prompt": "Winters are ", "answer": "dry and mild"},
    {"prompt": "The border runs along", "answer": "the ridge"},
    {"prompt": "Rain falls in", "choices": ["one season", "two seasons"], "answer": 1},
    {"prompt": "The people moved", "answer": " to the capital"},
]
# One space is there between prompt and answer, and it is the answer's where a token joins it to the answer.
ANSWERS = [" the north", " rich", " dry and mild", " the ridge", " two seasons", " to the capital"]


def written(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def examples(tmp_path, tokenizer):
    return read_examples(written(tmp_path / "task.jsonl", EXAMPLES), tokenizer, 64)


def test_an_example_is_its_prompt_and_its_answer_and_the_answer_alone_counts(examples, tokenizer):
    assert [len(part) for part in examples.windows] == [len(part) for part in examples.targets] == [5, 1]
    windows, targets = torch.cat(examples.windows), torch.cat(examples.targets)
    assert windows.shape == targets.shape
    for window, target, example, answer in zip(windows, targets, EXAMPLES, ANSWERS, strict=True):
        counted = target >= 0
        assert tokenizer.decode(target[counted]) == answer
        assert torch.equal(window[1:][counted[:-1]], target[counted])
        end = int(counted.nonzero().max()) + 2
        assert tokenizer.decode(window[:end]) == example["prompt"].rstrip() + answer
        assert not window[end:].any()


def test_an_example_starts_as_the_tokenizer_starts_a_text(examples, tmp_path, bos_tokenizer):
    (without, _), (windows, _) = examples.windows, read_examples(tmp_path / "task.jsonl", bos_tokenizer, 64).windows
    assert (windows[:, 0] == bos_tokenizer.bos_token_id).all()
    assert torch.equal(windows[:, 1:], without)


def test_the_loss_of_the_answers_decides(model, examples, tokens):
    def loss(gone, part=0):
        labels = torch.where(examples.targets[part] < 0, -100, examples.targets[part])
        with torch.no_grad(), masked(model, [s for c in gone for s in c.sublayers]):
            return cross_entropy(model(examples.windows[part]).logits.flatten(0, 1), labels.flatten()).item()

    removals, steps = brute_force(3, loss)
    given = {"divergence": "task", "targets": examples.targets}
    found = list(search(model, *examples.windows, 3, **given, mode="brute"))
    assert [r.sublayer for r in found] == removals
    assert found[2].values == pytest.approx(steps[2], rel=1e-4)
    assert found[2].held_out_divergence == pytest.approx(loss(list(map(parse, removals)), 1), rel=1e-4)
    assert [r.sublayer for r in search(model, *examples.windows, 3, **given)] == removals
    assert removals != [r.sublayer for r in search(model, tokens[:4], tokens[4:], 3)]
    # the answer's tokens alone are compared with the whole model's
    counted = examples.targets[1] >= 0
    with torch.no_grad():
        whole = model(examples.windows[1]).logits.argmax(-1)
        with masked(model, [s for name in removals for s in parse(name).sublayers]):
            agreeing = (model(examples.windows[1]).logits.argmax(-1) == whole)[counted]
    assert found[2].controls.agreement == pytest.approx(agreeing.double().mean().item())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([EXAMPLES[0]], "has 1 examples; at least 2 are needed"),
        ([EXAMPLES[0], "{"], r"task.jsonl:2 is not an example, .*Expecting property name"),
        ([EXAMPLES[0], {"prompt": "a"}], r"task.jsonl:2 is not an example, .* it has no 'answer'"),
        ([{"prompt": "a", "choices": ["b"], "answer": 1}], "answer 1 is not the index of one of its choices"),
        ([{"prompt": "a", "choices": ["b"], "answer": True}], "answer True is not the index"),
        ([{"prompt": " ", "answer": "b"}], "prompt and answer are texts, and not empty"),
        ([{"prompt": "a", "choices": "bc", "answer": 1}], "its choices are not a list"),
        ([[1, 2]], "task.jsonl:1 is not an example"),
        ([{"prompt": "a " * 90, "answer": "b"}], "tokens, more than the model takes, 64: shorten it"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, tokenizer, lines, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_examples(written(tmp_path / "task.jsonl", lines), tokenizer, 64)
    assert "\n" not in str(refused.value)


def test_a_file_may_begin_with_a_mark_and_its_texts_may_hold_separators_of_lines(tmp_path, tokenizer, examples):
    parted = [example | {"prompt": f"{example['prompt'].rstrip()}\u2028"} for example in EXAMPLES]
    file = tmp_path / "marked.jsonl"
    file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\r\n" for one in parted), encoding="utf-8-sig")
    found = read_examples(file, tokenizer, 64)
    assert [len(part) for part in found.windows] == [len(part) for part in examples.windows]


def test_a_missing_file_is_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"search.task: no file .*task.jsonl"):
        read_examples(tmp_path / "task.jsonl", tokenizer, 64)
