"""Figures a stage sends to MLflow while it works, when the flow that started it has a run open."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping

logger = logging.getLogger("finercut")

_given_up: set[str] = set()


def log_metrics(metrics: Mapping[str, float], step: int) -> None:
    """Add one point to each of the live series `live/<name>` of the run in MLFLOW_RUN_ID; without one, do nothing.

    A tracking server that fails must not cost hours of search: the first failure is a warning and ends the live
    series of this process. The flow logs the complete series, under other names, when the stage has ended.

    Never opens or closes a run: that would end the one the flow owns.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id or run_id in _given_up:
        return
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    now = int(time.time() * 1000)
    points = [Metric(f"live/{name}", value, now, step) for name, value in metrics.items()]
    try:
        MlflowClient().log_batch(run_id, metrics=points)
    except MlflowException as error:
        _given_up.add(run_id)
        logger.warning("MLflow took no live metrics (%s); going on without them", str(error).splitlines()[0])
