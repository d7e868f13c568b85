"""The MLflow server or store: its address, its errors, and a first contact that fails within seconds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from finercut.system.redaction import redacted

_CREDENTIALS = re.compile(r"//[^/?#\s]*@")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or an SQLite file in the current directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


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
        cause = redacted((str(error).splitlines() or ["no reason given"])[0].replace(uri, shown))
        raise RuntimeError(f"cannot {doing} in MLflow at {shown}: {cause}") from error


def _object_store_errors() -> tuple[type[Exception], ...]:
    """Of boto3, which MLflow uses where artifacts are in S3 and no server stands between; it lets them through."""
    botocore = sys.modules.get("botocore.exceptions")
    return (botocore.BotoCoreError, botocore.ClientError) if botocore else ()


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
    """Where MLflow's store is a database server, ask it once: MLflow itself would ask for two minutes."""
    uri = tracking_uri()
    if urlsplit(uri).scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        create_engine(uri).connect().close()
