"""Stage `costs`: what the whole model's sublayers cost in units that its config alone does not tell.

Nothing is measured where `prune.budget` needs none of it, and nothing heavy imported.
"""

from __future__ import annotations

import logging

from finercut.model.records import CostsReport
from finercut.selection.settings import MEASURED

from . import paths
from .params import Params

logger = logging.getLogger("finercut")


def run(params: Params) -> CostsReport:
    """
    Raises:
        FileNotFoundError: the model is missing.
        ValueError: vLLM has no such model.
        RuntimeError: vLLM is missing or failed.
    """
    budget, load = params.prune.budget, params.throughput
    if not budget.is_target:
        report = CostsReport()
        logger.info("costs: nothing to measure for a budget in %s", budget.unit)
    else:
        report = CostsReport(
            input_tokens=load.input_tokens,
            output_tokens=load.output_tokens,
            concurrency=load.concurrency,
            memory_tokens=load.concurrency * (load.input_tokens + load.output_tokens),
        )
        if budget.cost in MEASURED:
            from .costs_job import measured

            report = report.model_copy(update=measured(load))
    report.write(paths.report("costs"))
    return report
