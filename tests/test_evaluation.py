import copy
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_llama
from lm_eval.tasks import TaskManager

from finercut.evaluation import harness
from finercut.evaluation.harness import Score, compare, fit, load_tasks, score
from finercut.evaluation.settings import Task
from finercut.evaluation.smoke_tasks import lm_eval_config
from pipelines.params import load


@pytest.fixture(scope="module")
def model():
    return random_llama()


def scores(model, tokenizer, tasks, seed=0):
    return dict(score(model, tokenizer, tasks, seed=seed, batch_size=16))


def loglikelihood(model, tokenizer, text, continuation):
    ids = tokenizer(text + continuation).input_ids
    n_prompt = len(tokenizer(text).input_ids)
    with torch.no_grad():
        nats = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(nats[i - 1, ids[i]].item() for i in range(n_prompt, len(ids)))


def test_perplexity_is_the_exponential_of_the_loss_that_transformers_computes(model, tokenizer, tokens):
    with torch.no_grad():
        expected = math.exp(model(tokens, labels=tokens).loss.item())
        of_a, of_b = (math.exp(model(part, labels=part).loss.item()) for part in (tokens[[0, 2, 3, 5]], tokens[[1, 4]]))
    found = fit(model, tokenizer, tokens, ("a", "b", "a", "a", "b", "a"))
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.perplexity_by_source == pytest.approx({"a": of_a, "b": of_b}, rel=1e-5)
    assert fit(model, tokenizer, tokens[:1]).perplexity_by_source == {}


def test_a_model_that_knows_nothing_pays_for_every_token_alike(tokenizer):
    text = "Winters are dry and mild, and the rain falls in two seasons."
    window = tokenizer(text, return_tensors="pt").input_ids
    blank = random_llama()
    torch.nn.init.zeros_(blank.model.embed_tokens.weight)  # tied to the output: all logits are zero
    found = fit(blank, tokenizer, window)
    first = tokenizer.decode(window[0, :1])
    assert found.perplexity == pytest.approx(400)
    assert found.bits_per_byte == pytest.approx(math.log2(400) * (window.shape[1] - 1) / (len(text) - len(first)))


def test_overflowing_logits_are_an_error_that_names_the_dtype(tokenizer, tokens):
    model = random_llama().to(torch.float16)
    with torch.no_grad():
        model.model.norm.weight.fill_(60000)
    with pytest.raises(RuntimeError, match=r"float16 are not finite: set evaluate\.dtype"):
        fit(model, tokenizer, tokens)


def test_a_choice_is_scored_by_its_likelihood(model, tokenizer):
    n = 20
    found = scores(model, tokenizer, load_tasks([Task(name="finercut_agreement", metric="acc", limit=n)]))
    documents = lm_eval_config("finercut_agreement")["custom_dataset"]()["test"].select(range(n))
    right = [
        max((0, 1), key=lambda i, d=d: loglikelihood(model, tokenizer, d["text"], f" {d['choices'][i]}")) == d["answer"]
        for d in documents
    ]
    reached = found["finercut_agreement"]
    assert 0 < sum(right) < n
    assert reached.value == pytest.approx(sum(right) / n)
    p = sum(right) / n
    assert reached.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert (reached.n_samples, reached.n_available, reached.n_fewshot) == (n, 128, 0)
    assert reached.higher_is_better


def test_a_generation_counts_when_it_is_the_answer_and_no_more():
    (loaded,) = load_tasks([Task(name="finercut_copying", metric="exact_match")])
    task = loaded.leaves[0]
    task.build_all_requests(limit=4)
    # Examples are lines, so a model that goes on writes another line: what follows the first is no answer.
    assert all(request.args[1]["until"] == ["\n"] for request in task.instances)
    answers = [request.doc["answer"] for request in task.instances]
    said = [f" {answers[0]}", answers[1], f" {answers[2]} again", " no"]
    for request, text in zip(task.instances, said, strict=True):
        request.resps = [text]
    task.apply_filters()
    points = [task.process_results(r.doc, [r.filtered_resps["none"]])["exact_match"] for r in task.instances]
    assert points == [1, 1, 0, 0]


def test_the_same_model_scores_the_same_twice(model, tokenizer):
    tasks = load_tasks(
        [
            Task(name="finercut_category", metric="acc", limit=6, num_fewshot=2),
            Task(name="finercut_copying", metric="exact_match", limit=0.05),
            Task(name="finercut_cloze", metric="acc", limit=4),
        ]
    )
    first = scores(model, tokenizer, tasks)
    assert scores(model, tokenizer, tasks) == first
    assert [s.n_samples for s in first.values()] == [6, 3, 4]
    assert [s.n_fewshot for s in first.values()] == [2, 6, 0]


@pytest.mark.parametrize("lacking", ["an embedding for it", "a padding token"])
def test_what_batches_are_padded_with_does_not_matter(lacking, tokenizer):
    other = copy.deepcopy(tokenizer)
    if lacking == "a padding token":
        other.pad_token = None
    else:
        other.add_special_tokens({"pad_token": "<beyond>"})
        assert other.pad_token_id == 400
    model = random_llama(max_position_embeddings=2048)
    tasks = load_tasks([Task(name="finercut_copying", metric="exact_match", limit=4, num_fewshot=1)])
    assert scores(model, other, tasks) == scores(model, tokenizer, tasks)
    assert harness._padding_within(other, 400).pad_token_id == other.eos_token_id
    assert harness._padding_within(tokenizer, 400) is tokenizer


def test_a_group_is_scored_by_the_documents_of_its_tasks(tmp_path, model, tokenizer):
    parts = {"verbs": "agreement", "things": "category"}
    for name, smoke in parts.items():
        documents = lm_eval_config(f"finercut_{smoke}")["custom_dataset"]()["test"].select(range(20 + 10 * len(name)))
        documents.to_json(tmp_path / f"{name}.jsonl")
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / f"{name}.jsonl")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "text",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    group = {"group": "both", "task": [*parts], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    tasks = [harness._load(Task(name=name, metric="acc"), name, manager) for name in ("both", *parts)]
    found = scores(model, tokenizer, tasks)
    both, verbs, things = (found[name] for name in ("both", "verbs", "things"))
    assert (both.n_samples, both.n_available) == (70 + 80, 70 + 80)
    assert verbs.value != things.value
    assert both.value == pytest.approx((verbs.value * 70 + things.value * 80) / 150)
    assert both.stderr is not None


@pytest.fixture(scope="module")
def published():
    """lm-eval's own list of tasks, which takes seconds to read."""
    return TaskManager()


def test_an_unknown_task_is_answered_with_those_near_it():
    with pytest.raises(ValueError, match=r"no task 'helaswag'; near it are .*hellaswag"):
        load_tasks([Task(name="helaswag", metric="acc")])


def test_a_tag_is_answered_with_the_tasks_it_stands_for(published):
    with pytest.raises(
        ValueError, match="ai2_arc stands for several tasks, name those you want: arc_challenge, arc_easy"
    ):
        harness._check_known("ai2_arc", published)


def test_a_published_task_without_a_hub_says_what_to_do(published):
    with pytest.raises(RuntimeError, match=r"documents of task piqa: .*check the network, or .*finercut_agreement"):
        harness._load(Task(name="piqa", metric="acc"), "piqa", published)


def test_a_task_named_twice_is_refused():
    with pytest.raises(ValueError, match="names finercut_cloze more than once"):
        load_tasks([Task(name="finercut_cloze", metric="acc")] * 2)


def test_a_missing_metric_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="finercut_agreement has no metric 'acc_norm'; it has acc"):
        load_tasks([Task(name="finercut_agreement", metric="acc_norm")])


def test_a_metric_with_several_filters_asks_for_one():
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "loose")]
    config = lm_eval_config("finercut_copying") | {"filter_list": filters}
    manager = TaskManager(include_defaults=False)
    task = Task(name="finercut_copying", metric="exact_match,loose")
    assert harness._load(task, config, manager).metric_key == "exact_match,loose"
    with pytest.raises(
        ValueError, match="has several metrics 'exact_match'; it has exact_match,strict, exact_match,loose"
    ):
        harness._load(task.model_copy(update={"metric": "exact_match"}), config, manager)


def test_examples_for_a_task_that_takes_none_are_refused():
    config = lm_eval_config("finercut_agreement") | {"num_fewshot": 0}
    with pytest.raises(ValueError, match="finercut_agreement takes no examples, num_fewshot is 5"):
        harness._load(
            Task(name="finercut_agreement", metric="acc", num_fewshot=5), config, TaskManager(include_defaults=False)
        )


@pytest.mark.parametrize(("split", "n_most"), [("examples", 3), ("test", 146 - 1)])
def test_more_examples_than_there_are_are_refused_before_any_model_is_asked(split, n_most):
    config = lm_eval_config("finercut_capitals") | {"fewshot_split": split}
    manager = TaskManager(include_defaults=False)
    task = Task(name="finercut_capitals", metric="acc", num_fewshot=n_most + 1)
    with pytest.raises(ValueError, match=f"finercut_capitals has {n_most} examples, num_fewshot is {n_most + 1}"):
        harness._load(task, config, manager)
    loaded = harness._load(task.model_copy(update={"num_fewshot": n_most}), config, manager)
    (leaf,) = loaded.leaves
    leaf.set_fewshot_seed(1)
    leaf.build_all_requests(limit=1)
    assert leaf.instances


@pytest.mark.parametrize(
    ("whole", "pruned", "higher_is_better", "retention"),
    [(0.8, 0.6, True, 0.75), (10.0, 40.0, False, 0.25), (0.0, 0.1, True, None), (0.5, 0.0, True, 0.0)],
)
def test_retention_is_what_is_left_of_the_whole_models_score(whole, pruned, higher_is_better, retention):
    (task,) = load_tasks([Task(name="finercut_copying", metric="exact_match")])
    both = [
        Score(value=value, stderr=None, n_samples=10, n_available=60, n_fewshot=6, higher_is_better=higher_is_better)
        for value in (whole, pruned)
    ]
    result = compare(task, *both)
    assert result.retention == (None if retention is None else pytest.approx(retention))
    assert result.generative
    assert result.smoke


def test_a_task_that_runs_what_the_model_writes_is_refused():
    config = lm_eval_config("finercut_copying") | {"unsafe_code": True}
    with pytest.raises(ValueError, match="finercut_copying runs code that the model writes"):
        harness._load(Task(name="finercut_copying", metric="exact_match"), config, TaskManager(include_defaults=False))


def test_the_papers_nine_benchmarks_and_their_metrics_are_known_to_lm_eval(published):
    tasks = load(Path(__file__).parents[1] / "params/paper-llama3-8b.yaml").evaluate.tasks
    papers = [task for task in tasks if not task.name.startswith("finercut_")]
    assert len(papers) == 9
    for task in papers:
        harness._check_known(task.name, published)
        config = published.task_index[task.name].cfg
        metrics = config.get("metric_list") or config["aggregate_metric_list"]
        assert task.metric in {metric["metric"] for metric in metrics}
