"""The database of the Prefect server that is started for an execution when there is none."""

from __future__ import annotations

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import prefect.server.database
from prefect.settings import get_current_settings
from sqlalchemy import make_url

MIGRATIONS = Path(prefect.server.database.__file__).parent / "_migrations/versions/sqlite"


def check() -> None:
    """
    Raises:
        RuntimeError: it cannot be read or written, or another version of Prefect made it what it is; the server, which
            brings older ones up to date, would say so in a traceback of its own, and Prefect would start it again for
            ever.
    """
    settings = get_current_settings()
    url = make_url(settings.server.database.connection_url.get_secret_value())
    in_memory = (url.database or ":memory:").startswith((":memory:", "file:"))
    if settings.api.url is not None or url.get_backend_name() != "sqlite" or in_memory:
        return
    advice = "set PREFECT_HOME to another folder, or PREFECT_API_URL to a server"
    file = Path(url.database)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"Prefect's folder {file.parent} cannot be made ({error.strerror}): {advice}") from error
    if not all(os.access(path, os.W_OK) for path in (file.parent, file) if path.exists()):
        raise RuntimeError(f"Prefect's database {file} cannot be written to: {advice}")
    if not file.exists():
        return
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return  # the server makes it
        raise RuntimeError(f"Prefect's database {url.database} cannot be read ({error}): {advice}") from error
    except sqlite3.DatabaseError as error:
        raise RuntimeError(f"Prefect's database {url.database} is damaged ({error}): {advice}") from error
    if found and found[0] not in _revisions():
        raise RuntimeError(
            f"Prefect's database {url.database} is of another version than Prefect {prefect.__version__}: {advice}"
        )


def _revisions() -> set[str]:
    text = "".join(file.read_text(encoding="utf-8") for file in MIGRATIONS.glob("*.py"))
    return set(re.findall(r"^revision(?:: str)? = [\"'](\w+)[\"']", text, re.MULTILINE))
