"""The door to MLflow: the run that records an execution, and registered versions with their evidence."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient, pyfunc, set_tracking_uri
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from requests import RequestException
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from finercut.system.redaction import redacted

logger = logging.getLogger("finercut")

CHALLENGER = "challenger"
# A version has it from the moment it exists, and exists only once everything is uploaded.
PRUNED_MD5 = "finercut.pruned_md5"
_CREDENTIALS = re.compile(r"//[^/?#\s]*@")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or an SQLite file in the current directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


def without_credentials(uri: str) -> str:
    """`uri` fit to be shown: no user, password or query."""
    return _CREDENTIALS.sub("//", uri.partition("?")[0])


@contextmanager
def mlflow_errors(doing: str) -> Iterator[None]:
    """Turns MLflow's exceptions into one line that says what failed, where, and shows no credentials."""
    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        uri = tracking_uri()
        shown = without_credentials(uri)
        cause = redacted((str(error).splitlines() or ["no reason given"])[0].replace(uri, shown))
        raise RuntimeError(f"cannot {doing} in MLflow at {shown}: {cause}") from error


@contextmanager
def impatient() -> Iterator[None]:
    """MLflow waits minutes for a server that is not there; the first contact should not."""
    settings = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _reach_database() -> None:
    """Where MLflow's store is a database server, ask it once: MLflow itself would ask for two minutes."""
    uri = tracking_uri()
    if urlsplit(uri).scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        create_engine(uri).connect().close()


@dataclass(frozen=True)
class Run:
    """One execution in MLflow. All logging goes through the client: the fluent API is per thread and ends runs."""

    client: MlflowClient
    run_id: str
    experiment_id: str

    def log_tags(self, tags: Mapping[str, str]) -> None:
        with mlflow_errors("set tags"):
            self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

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
    """The finite numbers of a JSON report, named `<stem>/<key>/<key>`; booleans count as 0 and 1."""
    return {
        re.sub(r"[^\w\-. /]", "_", f"{path.stem}/{name}"): float(value)
        for name, value in flatten(json.loads(path.read_text(encoding="utf-8")), "/").items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def flatten(nested: Mapping[str, object], separator: str) -> dict[str, object]:
    """The leaves by their joined keys; lists are leaves."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{separator}{name}": leaf for name, leaf in flatten(value, separator).items()}
        else:
            flat[key] = value
    return flat


def open_run(experiment: str, params: Mapping[str, object], tags: Mapping[str, str]) -> Run:
    """Start a run with its parameters (flattened) and tags.

    Raises:
        RuntimeError: the server does not answer (within seconds), or the experiment was deleted.
    """
    # MLflow prints the run's address when it ends, with the password that is in it.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    set_tracking_uri(tracking_uri())
    shown = without_credentials(tracking_uri())
    with mlflow_errors("open a run"), impatient():
        _reach_database()
        client = MlflowClient()
        experiment_id = _experiment_id(client, experiment, shown)
        run_id = client.create_run(experiment_id, tags=dict(tags)).info.run_id
        flat = flatten(params, ".").items()
        client.log_batch(run_id, params=[Param(name, _shown(value)) for name, value in flat])
    logger.info("MLflow run %s at %s, experiment %s", run_id, shown, experiment)
    return Run(client, run_id, experiment_id)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _experiment_id(client: MlflowClient, name: str, shown_uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        served = urlsplit(tracking_uri()).scheme in ("http", "https", "databricks")
        # Without a server MLflow would take a folder relative to whichever directory a later reader is in.
        return client.create_experiment(name, None if served else Path("mlruns").absolute().as_uri())
    if found.lifecycle_stage != "active":
        raise RuntimeError(
            f"the MLflow experiment {name!r} at {shown_uri} is deleted; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}` or name another as flow.experiment"
        )
    return found.experiment_id


@contextmanager
def recorded(run: Run, log_file: Path | None = None) -> Iterator[None]:
    """Watches the machine meanwhile; at the end stores the log and closes the run as FINISHED, FAILED or KILLED."""
    monitor = SystemMetricsMonitor(run.run_id, tracking_uri=tracking_uri())
    monitor.start()
    try:
        yield
    finally:
        error = sys.exc_info()[1]
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


@dataclass(frozen=True)
class Registered:
    version: str
    model_uri: str


def find_version(run: Run, name: str, pruned_md5: str, collected: Collection[str] = ()) -> Registered | None:
    """The version of `name` that holds exactly this checkpoint; one of `collected` holds none."""
    with mlflow_errors(f"look for versions of {name}"):
        found = run.client.search_model_versions(f"name = '{name}'")
    same = [v for v in found if v.tags.get(PRUNED_MD5) == pruned_md5 and str(v.version) not in collected]
    return Registered(str(same[0].version), f"models:/{name}/{same[0].version}") if same else None


def register(
    run: Run,
    name: str,
    checkpoint: Path,
    evidence: Iterable[Path],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    pruned_md5: str,
) -> Registered:
    """Make `checkpoint` a new version of `name`.

    The weights are uploaded once, from where they lie: nothing is loaded or copied beforehand. The version's folder
    holds `checkpoint/`, `evidence/` (the files given) and a wrapper for `mlflow.pyfunc`.
    """
    with mlflow_errors(f"register {name}"):
        model_id = _upload(run, name, checkpoint, evidence, tags)
        run.log_metrics(metrics, model_id)
        return _new_version(run, name, model_id, {**tags, PRUNED_MD5: pruned_md5})


def challenge(run: Run, name: str, version: str) -> None:
    """Make it the version that `challenger` stands at."""
    with mlflow_errors(f"set the alias {CHALLENGER} of {name}"):
        run.client.set_registered_model_alias(name, CHALLENGER, version)


def _upload(run: Run, name: str, checkpoint: Path, evidence: Iterable[Path], tags: Mapping[str, str]) -> str:
    model = run.client.create_logged_model(run.experiment_id, name, run.run_id, tags=dict(tags), model_type="causal-lm")
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory() as folder:
            small = Path(folder) / "model"
            _write_wrapper(small, run.run_id, model.model_id)
            (small / "evidence").mkdir()
            for path in evidence:
                shutil.copyfile(path, small / "evidence" / path.name)
            run.client.log_model_artifacts(model.model_id, str(small))
        run.client.log_model_artifacts(model.model_id, str(checkpoint), "checkpoint")
        status = "READY"
    finally:
        run.client.finalize_logged_model(model.model_id, status)
    return model.model_id


def _write_wrapper(directory: Path, run_id: str, model_id: str) -> None:
    text = Schema([ColSpec("string")])
    with warnings.catch_warnings():
        # It recommends an input example to those who give no signature, but also to those who do.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"mlflow\.")
        pyfunc.save_model(
            path=directory,
            python_model=str(Path(__file__).with_name("served_model.py")),
            mlflow_model=Model(artifact_path=None, run_id=run_id, model_id=model_id),
            signature=ModelSignature(text, text, ParamSchema([ParamSpec("max_new_tokens", "long", 64)])),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in ("mlflow", "torch", "transformers")],
        )


def _public_version(package: str) -> str:
    """Without the local part: a server installs `2.13.0` for its own hardware, not our `2.13.0+cpu`."""
    return version(package).partition("+")[0]


def _new_version(run: Run, name: str, model_id: str, tags: Mapping[str, str]) -> Registered:
    try:
        run.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = run.client.create_model_version(
        name, source=f"models:/{model_id}", run_id=run.run_id, tags=dict(tags), model_id=model_id
    )
    return Registered(str(created.version), f"models:/{name}/{created.version}")
