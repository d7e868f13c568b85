"""Live metrics from a stage."""

import logging
import subprocess
import sys
import time

import pytest

from finercut.registry import live, runs


@pytest.fixture
def lost_server(monkeypatch):
    """A run id for a port nobody listens on."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_RUN_ID", "lost")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield
    live._series.clear()


def test_without_a_run_mlflow_is_not_even_imported():
    code = (
        "import os, sys; os.environ.pop('MLFLOW_RUN_ID', None); from finercut.registry import live; "
        "live.log_metrics({'a': 1.0}, 1); assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_points_reach_the_open_run_under_live_names(mlflow_store, monkeypatch):
    run = runs.open_run("live", {}, {}, "tiny")
    monkeypatch.setenv("MLFLOW_RUN_ID", run.run_id)
    live.log_metrics({"search.divergence": 0.5}, step=1)
    live.log_metrics({"search.divergence": 0.75}, step=2)
    history = run.client.get_metric_history(run.run_id, "live search/divergence")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.75)]
    assert run.client.get_run(run.run_id).info.status == "RUNNING"


def test_a_lost_server_is_warned_about_once_and_does_not_stop_the_stage(lost_server, caplog):
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, "finercut"):
        for step in range(3):
            live.log_metrics({"search.divergence": 0.5}, step)
    assert [r.message.partition(" (")[0] for r in caplog.records] == ["MLflow takes no live metrics"]
    assert time.monotonic() - started < 30
