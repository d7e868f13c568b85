"""Stage `evaluate_whole`: the whole model's scores and perplexity, measured once for all budgets and steps."""

from __future__ import annotations

from finercut.evaluation.measure import measure
from finercut.evaluation.records import Measured
from finercut.model.directory import ModelDirectory
from finercut.tokens import load_tokens

from . import paths
from .params import Params


def run(params: Params) -> Measured:
    """
    Raises:
        FileNotFoundError: the model or the calibration set is missing.
        ValueError: a task, metric or device that does not exist.
        RuntimeError: a task's documents cannot be had.
    """
    model = ModelDirectory(paths.MODEL).written_by("fetch")
    measured = measure("whole", model, load_tokens(paths.CALIBRATION), params.evaluate, judged=True)
    measured.write(paths.report("evaluate_whole"))
    return measured
