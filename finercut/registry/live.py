"""Figures a stage sends to MLflow while it works, when the flow that started it has a run open."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger("finercut")

# A server that failed is asked again after this long: each question can cost the stage seconds.
PAUSE_S = 60.0
# What MLflow takes in one request.
MOST_POINTS = 1000


@dataclass
class _Series:
    """What is still to be delivered to one run."""

    points: list[Metric] = field(default_factory=list)
    failing: bool = False
    next_try: float = 0.0
    """On the monotonic clock."""


_series: dict[str, _Series] = {}


def log_metrics(metrics: Mapping[str, float], step: int) -> None:
    """Add one point to each of the live series of the run in MLFLOW_RUN_ID; without one, do nothing.

    `search.divergence` is the series `live search/divergence`: MLflow groups charts by what precedes the slash.

    A tracking server that fails must not cost hours of search: the first failure is a warning, points are kept, and
    they are delivered once it answers again. The flow logs the complete series, under other names, when the stage has
    ended.

    Never opens or closes a run: that would end the one the flow owns.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return
    from mlflow.entities import Metric

    series = _series.setdefault(run_id, _Series())
    now = int(time.time() * 1000)
    series.points += [Metric(f"live {name.replace('.', '/', 1)}", value, now, step) for name, value in metrics.items()]
    if time.monotonic() >= series.next_try:
        _deliver(run_id, series)


def finish() -> None:
    """Try to deliver what is left, once; say what is lost."""
    for run_id, series in _series.items():
        if series.points and not _deliver(run_id, series):
            logger.warning("MLflow still takes no live metrics: %d points are lost", len(series.points))
    _series.clear()


def _deliver(run_id: str, series: _Series) -> bool:
    from mlflow import MlflowClient

    from finercut.registry.server import mlflow_errors

    n_points = len(series.points)
    try:
        with mlflow_errors("log live metrics"):
            while series.points:
                MlflowClient().log_batch(run_id, metrics=series.points[:MOST_POINTS])
                del series.points[:MOST_POINTS]
    except RuntimeError as error:
        if not series.failing:
            logger.warning("MLflow takes no live metrics (%s); going on, they are kept", error)
        series.failing, series.next_try = True, time.monotonic() + PAUSE_S
        return False
    if series.failing:
        logger.info("MLflow answers again: %d live points delivered", n_points)
    series.failing = False
    return True
