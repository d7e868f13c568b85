"""The MLflow run that records an execution: parameters, metrics, reports, log, system metrics, outcome."""

from __future__ import annotations

import csv
import getpass
import hashlib
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient, artifacts, set_tracking_uri
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE, MLFLOW_USER
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, MAX_TAG_VAL_LENGTH

import finercut
from finercut.registry.server import (
    check_place,
    check_registry,
    impatient,
    mlflow_errors,
    reach_database,
    tracking_uri,
    without_credentials,
)
from finercut.system.records import flatten
from finercut.system.redaction import redacted

logger = logging.getLogger("finercut")

# Says that experiments are for MLflow's view for training. Where a user can switch views, the address or the browser's
# last choice counts instead: see `page`.
EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}


@dataclass(frozen=True)
class Run:
    """One execution in MLflow. All logging goes through the client: the fluent API is per thread and ends runs."""

    client: MlflowClient
    run_id: str
    experiment_id: str

    def log_tags(self, tags: Mapping[str, str]) -> None:
        with mlflow_errors("set tags"):
            self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def page(self, part: str = "") -> str | None:
        """Its address, in MLflow's view for training; None where there is no server to show it.

        Args:
            part: such as `/artifacts/reports/report.html`
        """
        uri = without_credentials(tracking_uri())
        if not uri.startswith(("http://", "https://")):
            return None
        run = f"{uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"{run}{part}?workflowType=machine_learning"

    def describe(self, markdown: str) -> None:
        """Set the description on the run's page."""
        self.log_tags({MLFLOW_RUN_NOTE: markdown[:MAX_TAG_VAL_LENGTH]})

    def log_metrics(self, metrics: Mapping[str, float], model_id: str | None = None) -> None:
        now = int(time.time() * 1000)
        points = [Metric(name, value, now, 0, model_id=model_id) for name, value in metrics.items()]
        with mlflow_errors("log metrics"):
            self.client.log_batch(self.run_id, metrics=points)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        with mlflow_errors(f"store {path}"):
            self.client.log_artifact(self.run_id, str(path), folder)

    def log_reports(self, paths: Iterable[Path]) -> None:
        """Store the files, the numbers of each JSON file as metrics, and each CSV file with a `step` as series."""
        for path in paths:
            self.log_file(path, "reports")
            if path.suffix == ".json":
                self.log_metrics(numbers(path))
            elif path.suffix == ".csv":
                self._log_series(path)

    def _log_series(self, path: Path) -> None:
        now = int(time.time() * 1000)
        with path.open(encoding="utf-8", newline="") as file:
            points = [
                Metric(f"{path.stem}/{name}", float(value), now, int(row["step"]))
                for row in csv.DictReader(file)
                for name, value in row.items()
                if name != "step" and _is_number(value)
            ]
        with mlflow_errors(f"log {path}"):
            self.client.log_batch(self.run_id, metrics=points)


def numbers(path: Path) -> dict[str, float]:
    """The finite numbers of a JSON report, named `<stem>/<key>/<key>`; booleans count as 0 and 1.

    Keys may be paths of texts, and of any length: MLflow takes names that are paths as they stand, within a length.
    """
    found: dict[str, float] = {}
    for key, value in flatten(json.loads(path.read_text(encoding="utf-8")), "/").items():
        if isinstance(value, int | float) and math.isfinite(value):
            plain = re.sub(r"[^\w\-. /]", "_", f"{path.stem}/{key}")
            name = "/".join(part for part in plain.split("/") if part not in ("", ".", ".."))
            if name in found or len(name) > MAX_ENTITY_KEY_LENGTH:
                name = f"{name[: MAX_ENTITY_KEY_LENGTH - 9]}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
            found[name] = float(value)
    return found


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def open_run(
    experiment: str, params: Mapping[str, object], tags: Mapping[str, str], model: str, name: str | None = None
) -> Run:
    """Start a run with its parameters (flattened) and tags.

    Args:
        model: what it is to register.
        name: None lets MLflow make one up.

    Raises:
        RuntimeError: the server does not answer (within seconds), the experiment was deleted, the registry is another
            server, or it takes no versions of that model.
    """
    check_registry()
    # MLflow prints the run's address when it ends, with the password that is in it.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    set_tracking_uri(tracking_uri())
    shown = without_credentials(tracking_uri())
    with mlflow_errors("open a run"), impatient():
        reach_database()
        client = MlflowClient()
        check_place(client)
        experiment_id = _experiment_id(client, experiment, shown)
        # Registration, hours later, needs both.
        with mlflow_errors("find logged models, which MLflow has since 3.0,"):
            client.search_logged_models([experiment_id], max_results=1)
        _check_registrable(client, model)
        tags = {MLFLOW_USER: getpass.getuser(), **tags}
        run = Run(client, client.create_run(experiment_id, tags=tags, run_name=name).info.run_id, experiment_id)
    try:
        with mlflow_errors("record parameters"), impatient():
            flat = flatten(params, ".").items()
            client.log_batch(run.run_id, params=[Param(name, _shown(value)) for name, value in flat])
        logger.info("MLflow run %s at %s, experiment %s", run.run_id, shown, experiment)
    except BaseException as error:
        _close(run, error, None)
        raise
    return run


def _check_registrable(client: MlflowClient, model: str) -> None:
    named = f"name = '{model}'"
    with mlflow_errors("find a model registry"):
        found = client.search_registered_models(named)
    with mlflow_errors(f"register {model}"):
        if client.search_prompts(named):  # models and prompts share their names, and neither list has the other's
            raise MlflowException("a prompt has this name: choose another as register.name")
        if found:
            client.set_registered_model_tag(model, "finercut", finercut.__version__)  # who may, may add versions


def download(run_id: str, folders: Sequence[str], directory: Path) -> list[Path]:
    """Those of a run's folders that are there, downloaded into `directory`.

    Raises:
        RuntimeError: there is no such run, or the server does not answer within seconds.
    """
    set_tracking_uri(tracking_uri())
    with mlflow_errors(f"find run {run_id}"), impatient():
        reach_database()
        stored = {file.path for file in MlflowClient().list_artifacts(run_id)}
    with mlflow_errors(f"download files of run {run_id}"):
        return [
            Path(artifacts.download_artifacts(run_id=run_id, artifact_path=folder, dst_path=str(directory)))
            for folder in folders
            if folder in stored
        ]


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _experiment_id(client: MlflowClient, name: str, shown_uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        served = urlsplit(tracking_uri()).scheme in ("http", "https", "databricks")
        # Without a server MLflow would take a folder relative to whichever directory a later reader is in.
        location = None if served else Path("mlruns").absolute().as_uri()
        try:
            return client.create_experiment(name, location, tags=EXPERIMENT_KIND)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another execution made it meanwhile
    if found.lifecycle_stage != "active":
        raise RuntimeError(
            f"the MLflow experiment {name!r} at {shown_uri} is deleted; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}` or name another as flow.experiment"
        )
    for tag, value in EXPERIMENT_KIND.items():
        if tag not in found.tags:
            client.set_experiment_tag(found.experiment_id, tag, value)
    return found.experiment_id


@contextmanager
def recorded(run: Run, log_file: Path | None = None) -> Iterator[None]:
    """Watches the machine meanwhile; at the end stores the log and closes the run as FINISHED, FAILED or KILLED."""
    monitor = None
    try:
        monitor = SystemMetricsMonitor(run.run_id, tracking_uri=tracking_uri())
        monitor.start()
        yield
    finally:
        error = sys.exc_info()[1]
        if monitor is not None:
            monitor.finish()
        _close(run, error, log_file)


def _close(run: Run, error: BaseException | None, log_file: Path | None) -> None:
    status = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
    try:
        if error is not None:
            run.log_tags({"failure": redacted(str(error)) or type(error).__name__})
        if log_file is not None and log_file.is_file():
            run.log_file(log_file)
        with mlflow_errors("close the run"):
            run.client.set_terminated(run.run_id, status)
    except RuntimeError as unrecorded:
        if error is None:
            raise
        # The failure that ended the execution is the one to report.
        logger.warning("the run's end is not recorded: %s", unrecorded)
