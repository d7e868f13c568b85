"""The MLflow server or store: its address, its errors, and a first contact that fails within seconds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from requests import RequestException
from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.exc import SQLAlchemyError

from finercut.system.redaction import redacted

_CREDENTIALS = re.compile(r"//[^/?#\s]*@")
# Stores that were taken for want of an address; MLflow puts the one it is given where a user's would be.
_own: set[str] = set()


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or an SQLite file in the current directory.

    Raises:
        RuntimeError: that is no address, or there is none of that file.
    """
    here = Path.cwd()
    if given := os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        if re.fullmatch(r"[\w.-]+:\d+(/.*)?", given):  # which MLflow takes for a folder
            raise RuntimeError(f"MLFLOW_TRACKING_URI is {given}: put http:// or https:// before it")
        shown = without_credentials(given)
        if given[0] in "\"'":  # as files of variables keep them that a shell does not read
            raise RuntimeError(f"MLFLOW_TRACKING_URI is {shown}, with quotes in it: take them away")
        if "#" in given and given.startswith("http"):
            address = without_credentials(given.partition("#")[0])
            raise RuntimeError(f"MLFLOW_TRACKING_URI is {shown}, a page of MLflow's: name the server alone, {address}")
        if not given.startswith("sqlite:"):
            return given
        if not given.partition("?")[0].removeprefix("sqlite:").strip("/") or ":memory:" in given:
            raise RuntimeError(f"MLFLOW_TRACKING_URI is {given}, a database that ends with the process: name a file")
    # MLflow writes the path of artifacts, here/mlruns, into its SQL as it is.
    if bad := [c for c in ("'" if given else "'?") if c in str(here)]:
        raise RuntimeError(
            f"MLflow keeps no runs in a folder with {bad[0]} in its path, as {here}: rename it, or set "
            "MLFLOW_TRACKING_URI to a server's address"
        )
    if given:
        return given
    _own.add(own := f"sqlite:///{here / 'mlflow.db'}")
    return own


def without_credentials(uri: str) -> str:
    """`uri` fit to be shown: no user, password or query."""
    return _CREDENTIALS.sub("//", uri.partition("?")[0])


@contextmanager
def mlflow_errors(doing: str) -> Iterator[None]:
    """Turns MLflow's exceptions into one line that says what failed, where, and shows no credentials.

    So too the missing library of an artifact store, which MLflow imports when it first uses the store.
    """
    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, ImportError, *_object_store_errors()) as error:
        uri = tracking_uri()
        shown = without_credentials(uri)
        # SQLAlchemy may put advice for programmers before what the database said.
        told = getattr(error.__cause__, "orig", None) or getattr(error, "orig", None) or error
        lines = [line.strip(" #") for line in str(told).splitlines()]
        first, *others = list(filter(None, lines)) or ["no reason given"]
        if first.endswith(":") and others:  # the reason is what follows
            first = f"{first} {others[0]}"
        cause = redacted(first.replace(uri, shown))
        if "error code 401" in cause:
            cause += "; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are whom the server knows you by"
        raise RuntimeError(f"cannot {doing} in MLflow at {shown}: {cause}") from error


def _object_store_errors() -> tuple[type[Exception], ...]:
    """Of boto3, which MLflow uses where artifacts are in S3 and no server stands between; it lets them through."""
    botocore = sys.modules.get("botocore.exceptions")
    return (botocore.BotoCoreError, botocore.ClientError) if botocore else ()


def check_registry() -> None:
    """
    Raises:
        RuntimeError: the registry is another server than the runs'. It could not find what a version is made from.
    """
    given = os.environ.get("MLFLOW_REGISTRY_URI", "")
    uris = [uri.rstrip("/") for uri in (given, tracking_uri())]
    if all(uri.startswith(("http://", "https://")) for uri in uris) and uris[0] != uris[1]:
        raise RuntimeError(
            f"MLFLOW_REGISTRY_URI is {without_credentials(given)}, another server than MLFLOW_TRACKING_URI, which has "
            "the files that versions are made from: unset it"
        )


def check_place(client: MlflowClient) -> None:
    """
    Raises:
        RuntimeError: the store is this folder's own and was made in another: the project was moved or copied, and the
            files would be those of the other.
    """
    if tracking_uri() not in _own:
        return
    here = Path.cwd()
    for experiment in client.search_experiments(view_type=ViewType.ALL):
        if not experiment.artifact_location.startswith("file:"):
            continue
        files = Path(local_file_uri_to_path(experiment.artifact_location))
        if files.name == "mlruns" and files.resolve() != (here / "mlruns").resolve():
            raise RuntimeError(
                f"mlflow.db is of the project at {files.parent}, and looks for its runs' and versions' files there: "
                f"after a move, `ln -s {here} {files.parent}`; in a copy, delete mlflow.db and mlruns"
            )


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


def reach_database() -> None:
    """Where MLflow's store is a database, ask it once: MLflow itself would ask for two minutes."""
    uri = tracking_uri()
    kind = urlsplit(uri).scheme.partition("+")[0]
    # MLflow makes the folder of an SQLite file.
    found = kind == "sqlite" and Path(make_url(uri).database or ":memory:").parent.is_dir()
    if found or kind in ("postgresql", "mysql", "mssql"):
        engine = create_engine(uri)
        inspect(engine).get_table_names()
        engine.dispose()
