"""Runs lm-eval tasks, and computes perplexity on held-out tokens."""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import itertools
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lm_eval
import torch
from lm_eval.api.task import Task as LmEvalTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from finercut.evaluation.records import Score, TaskResult
from finercut.evaluation.settings import Task
from finercut.evaluation.smoke_tasks import PREFIX, SMOKE_TASKS, lm_eval_config
from finercut.tokens import by_source

logger = logging.getLogger("finercut")


@dataclass(frozen=True)
class LoadedTask:
    """A task that lm-eval has read, with its documents."""

    settings: Task
    loaded: TaskDict
    metric_key: str
    """As lm-eval's results name it: `acc,none`."""

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def smoke(self) -> bool:
        return self.name in SMOKE_TASKS

    @property
    def leaves(self) -> list[LmEvalTask]:
        """Itself, or the tasks of a group such as mmlu."""
        return list(self.loaded["tasks"].values())


@dataclass(frozen=True)
class Fit:
    """How well a model predicts the held-out tokens."""

    perplexity: float
    bits_per_byte: float
    perplexity_by_source: dict[str, float]
    """Empty where all tokens are from one."""


def load_tasks(tasks: Sequence[Task]) -> list[LoadedTask]:
    """Read every task and its documents, which takes no model.

    Raises:
        ValueError: a task is unknown, named twice, lacks the metric, takes no examples, or runs what the model writes.
        RuntimeError: its documents, or a package it needs, cannot be had.
    """
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"evaluate.tasks names {', '.join(sorted(twice))} more than once")
    published = [name for name in names if not name.startswith(PREFIX)]
    smoke = [lm_eval_config(name) for name in names if name.startswith(PREFIX)]
    with _quiet():
        # Reading lm-eval's own list takes seconds: only where it is needed.
        manager = TaskManager(include_defaults=bool(published))
        for name in published:
            _check_known(name, manager)
        configs = {config["task"]: config for config in smoke}
        return [_load(task, configs.get(task.name, task.name), manager) for task in tasks]


def _check_known(name: str, manager: TaskManager) -> None:
    if name in manager.all_tags:
        tasks = ", ".join(sorted(manager.task_index[name].tags))
        raise ValueError(f"evaluate.tasks: {name} stands for several tasks, name those you want: {tasks}")
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [*manager.all_tasks, *SMOKE_TASKS], n=5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise ValueError(f"evaluate.tasks: lm-eval {lm_eval.__version__} has no task {name!r}{hint}")


def _load(settings: Task, spec: str | dict[str, Any], manager: TaskManager) -> LoadedTask:
    try:
        loaded = manager.load([spec])
    except OSError as error:  # the hub's refusals and silences, and datasets that are not there
        raise RuntimeError(
            f"cannot load the documents of task {settings.name}: {error}; lm-eval takes them from the Hugging Face "
            f"hub, or from its cache on this machine: check the network, or take the tasks {', '.join(SMOKE_TASKS)}"
        ) from error
    except ImportError as error:
        raise RuntimeError(f"task {settings.name} needs a package that is missing: {error}") from error
    task = LoadedTask(settings, loaded, _metric_key(settings, loaded))
    for leaf in task.leaves:
        if getattr(leaf, "UNSAFE_CODE", False):
            raise ValueError(f"evaluate.tasks: {task.name} runs code that the model writes, which is not done here")
        if settings.num_fewshot and leaf.get_config("num_fewshot") == 0:
            raise ValueError(f"evaluate.tasks: {task.name} takes no examples, num_fewshot is {settings.num_fewshot}")
        own = leaf.get_config("num_fewshot") or 0
        n_examples = own if settings.num_fewshot is None else settings.num_fewshot
        if n_examples > (n_most := _most_examples(leaf)):
            raise ValueError(f"evaluate.tasks: {task.name} has {n_most} examples, num_fewshot is {n_examples}")
        leaf.set_config("num_fewshot", n_examples)
    return task


def _most_examples(leaf: LmEvalTask) -> float:
    """No limit where the task does not say what it draws from."""
    sampler, drawn = getattr(leaf, "sampler", None), getattr(leaf, "fewshot_cfg", None)
    if sampler is None or drawn is None:
        return math.inf
    # Of those it evaluates, a document is not its own example.
    return len(sampler.df) - (drawn.split == leaf.get_config("test_split"))


def _metric_key(settings: Task, loaded: TaskDict) -> str:
    """
    Raises:
        ValueError: the task has no such metric, or several.
    """
    available = list(dict.fromkeys(key for task in loaded["tasks"].values() for key in _metric_keys(task)))
    if group := loaded["groups"].get(settings.name):
        aggregated = {metric.metric for metric in group.aggregate_metric_list or []}
        available = [key for key in available if key.partition(",")[0] in aggregated]
    matching = [key for key in available if settings.metric in (key, key.partition(",")[0])]
    if len(matching) != 1:
        shown = ", ".join(key.removesuffix(",none") for key in available) or "none of its own: name its tasks"
        found = "several metrics" if matching else "no metric"
        raise ValueError(f"evaluate.tasks: {settings.name} has {found} {settings.metric!r}; it has {shown}")
    return matching[0]


def _metric_keys(task: LmEvalTask) -> list[str]:
    filters = [entry["name"] for entry in task.get_config("filter_list") or [{"name": "none"}]]
    return [f"{metric},{name}" for metric in task.aggregation() for name in filters]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[LoadedTask],
    *,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[str, Score]]:
    """Evaluate `model` on one task after the other, in its own dtype, on its own device.

    Returns:
        name and score of each task, as soon as it is done
    """
    with _quiet():
        padding = _padding_within(tokenizer, model.config.get_text_config().vocab_size)
        served = HFLM(pretrained=model, tokenizer=padding, batch_size=batch_size, backend="causal")
    for task in tasks:
        with _quiet():
            set_seed(seed)
            for leaf in task.leaves:
                leaf.set_fewshot_seed(seed)
            # Not simple_evaluate, which spends seconds a call on a list of every package installed.
            results = lm_eval.evaluate(served, task.loaded, limit=task.settings.limit, log_samples=False)
        yield task.name, _score(task, results)


def rehearse(
    tokenizer: PreTrainedTokenizerBase, tasks: Sequence[LoadedTask], *, vocab_size: int, n_positions: int
) -> None:
    """Evaluate a document of each task with a tiny random model in place of the one that has this tokenizer.

    Raises:
        ValueError: lm-eval cannot, and why.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=n_positions,
    )
    model = LlamaForCausalLM(config).eval()
    for task in tasks:
        short = replace(task, settings=task.settings.model_copy(update={"limit": 1}))
        try:
            dict(score(model, tokenizer, [short], seed=0, batch_size=1))
        except Exception as error:
            # What a tokenizer lacks is an error of any class where lm-eval first needs it.
            reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
            if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
                reason += "; it has neither BOS nor EOS, one of which lm-eval begins texts with"
            raise ValueError(
                f"evaluate.tasks: lm-eval cannot run {task.name} with the model's tokenizer: {reason}; take other "
                "tasks, or mend the tokenizer"
            ) from error


def _padding_within(tokenizer: PreTrainedTokenizerBase, n_embeddings: int) -> PreTrainedTokenizerBase:
    """One whose padding token the model has an embedding for; as padding is masked, any token will do.

    Some tokenizers got theirs without the embeddings being enlarged, and lm-eval gives those without one a new one.
    """
    if tokenizer.pad_token_id is not None and 0 <= tokenizer.pad_token_id < n_embeddings:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    token = next(t for t in (tokenizer.eos_token_id, tokenizer.bos_token_id, 0) if t is not None and t < n_embeddings)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
    return tokenizer


def _score(task: LoadedTask, results: Mapping[str, Any]) -> Score:
    name = task.name
    metric, filter_name = task.metric_key.split(",")
    figures = results["results"][name]
    stderr = figures[f"{metric}_stderr,{filter_name}"]
    counts = [results["n-samples"][leaf.task_name] for leaf in task.leaves]
    return Score(
        value=float(figures[task.metric_key]),
        stderr=None if stderr == "N/A" else float(stderr),
        n_samples=sum(count["effective"] for count in counts),
        n_available=sum(count["original"] for count in counts),
        n_fewshot=results["n-shot"][name],
        # None where the tasks of a group disagree.
        higher_is_better=results["higher_is_better"][name].get(metric) is not False,
        chance=_chance(task) if metric in ("acc", "acc_norm") else None,
    )


def _chance(task: LoadedTask) -> float | None:
    """Accuracy of guessing; None where not every task of a group is a choice among answers."""
    n_choices = []
    for leaf in task.leaves:
        if leaf.get_config("output_type") != "multiple_choice":
            return None
        docs = itertools.islice(leaf.eval_docs, task.settings.limit if isinstance(task.settings.limit, int) else None)
        n_choices += [len(leaf.doc_to_choice(doc)) for doc in docs]
    return sum(1 / n for n in n_choices) / len(n_choices) if n_choices else None


def compare(task: LoadedTask, whole: Score, pruned: Score) -> TaskResult:
    """Both models' scores; retention turns the ratio around where lower is better, so that less is always worse."""
    best, reached = (whole.value, pruned.value) if whole.higher_is_better else (pruned.value, whole.value)
    return TaskResult(
        metric=task.settings.metric,
        whole=whole.value,
        whole_stderr=whole.stderr,
        pruned=pruned.value,
        pruned_stderr=pruned.stderr,
        retention=reached / best if best else None,
        n_samples=whole.n_samples,
        n_available=whole.n_available,
        n_fewshot=whole.n_fewshot,
        generative=any(leaf.get_config("output_type") == "generate_until" for leaf in task.leaves),
        higher_is_better=whole.higher_is_better,
        smoke=task.smoke,
    )


# Modules of lm-eval that advise those who write a program around it, as warnings.
_ADVISING = ("lm_eval.api.task", "lm_eval.models.huggingface")
_ADVICE = ("Custom kwargs can be passed", "`pretrained` model kwarg is not", "Passed an already-initialized model")


def _no_advice(record: logging.LogRecord) -> bool:
    return not any(advice in record.getMessage() for advice in _ADVICE)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's notes, and off a terminal its progress bars, out of the log; its warnings go there."""
    theirs = logging.getLogger("lm_eval")
    level = theirs.level
    theirs.setLevel(logging.WARNING)
    for name in _ADVISING:
        logging.getLogger(name).addFilter(_no_advice)  # a second time changes nothing
    try:
        if sys.stderr.isatty():
            yield
        else:
            with contextlib.closing(_WithoutBars()) as stream, contextlib.redirect_stderr(stream):
                yield
    finally:
        theirs.setLevel(level)


class _WithoutBars(io.TextIOBase):
    """Passes the lines written to it on to the log, except progress bars, which return to the start of their line."""

    def __init__(self) -> None:
        self._begun = ""
        self._stderr = sys.stderr

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._tell(line)
        return len(text)

    def flush(self) -> None:
        # Bars flush within their line; what is no bar waits for its end.
        if "\r" in self._begun:
            self._begun = ""

    def close(self) -> None:
        self._tell(self._begun)
        self._begun = ""
        super().close()

    def _tell(self, line: str) -> None:
        if line.strip() and "\r" not in line:
            # Handlers may look stderr up: their lines must not come back here.
            with contextlib.redirect_stderr(self._stderr):
                logger.warning("lm-eval: %s", line.rstrip())


@torch.inference_mode()
def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    sources: Sequence[str] = (),
    start: int | None = None,
) -> Fit:
    """How well `model` predicts each window's tokens from those before them, its first token left out.

    Args:
        windows: token ids, (samples, tokens)
        sources: of each window; empty where all are from one.
        start: put before each window; not predicted itself.

    Raises:
        RuntimeError: logits that are not finite.
    """
    nats: list[float] = []
    n_bytes = 0
    for window in windows.to(model.device):
        led = window if start is None else torch.cat([window.new_tensor([start]), window])
        logits = model(led[None], use_cache=False).logits[0, -len(window) : -1].float()
        nats.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item())
        n_bytes += len(tokenizer.decode(window[1:], clean_up_tokenization_spaces=False).encode())
    if not math.isfinite(sum(nats)):
        raise RuntimeError(f"logits in {model.dtype} are not finite: set evaluate.dtype to bfloat16 or float32")
    n_predicted = windows.shape[1] - 1
    return Fit(
        perplexity=math.exp(sum(nats) / (len(nats) * n_predicted)),
        bits_per_byte=sum(nats) / math.log(2) / n_bytes,
        perplexity_by_source={
            s: math.exp(sum(lost) / (len(lost) * n_predicted)) for s, lost in by_source(nats, sources).items()
        },
    )
