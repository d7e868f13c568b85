"""As much of the Hugging Face hub as its client asks for, on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
COMMIT = "c0ffee" + 34 * "0"


def client_environment(endpoint: str, home: Path) -> dict[str, str]:
    """For a process that takes `endpoint` for the hub: the client reads its settings when it is imported."""
    return {
        **{k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    }


def answer_of(code: str, *arguments: str, endpoint: str, folder: Path, home: str = "home", **environment: str) -> Any:
    """What `code` prints in JSON on its last line, in a process of its own that takes `endpoint` for the hub."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=client_environment(endpoint, folder / home) | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Repository:
    """Has one branch, `main`, at `commit`."""

    commit: str
    files: dict[str, bytes]
    gated: bool = False
    status: int | None = None
    """What every request is answered with, instead."""
    n_failures: int | None = None
    """How many requests `status` answers, if not all."""
    stalls_at: str | None = None
    """Of this file half is sent, and then nothing until `Hub.go_on` is set."""


@dataclass
class Hub:
    repositories: dict[str, Repository]
    """By path: `owner/name`, `datasets/owner/name`."""
    endpoint: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path."""
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.served.requests.append((self.command, path))
        api = path.startswith("api/")
        path = path.removeprefix("api/").removeprefix("models/")
        for name, repository in self.served.repositories.items():
            if path.startswith(f"{name}/"):
                return self._answer(repository, name, path.removeprefix(f"{name}/"), api)
        return self._refuse(404, "RepoNotFound")

    def _answer(self, repository: Repository, name: str, rest: str, api: bool) -> None:
        if repository.status and repository.n_failures != 0:
            if repository.n_failures is not None:
                repository.n_failures -= 1
            return self._refuse(repository.status)
        action, revision, *inside = rest.split("/", 2)
        if revision not in ("main", repository.commit):
            return self._refuse(404, "RevisionNotFound")
        if api:
            return self._send(json.dumps(self._listing(repository, name, action)).encode(), "application/json")
        if inside[0] not in repository.files:
            return self._refuse(404, "EntryNotFound")
        if repository.gated:
            return self._refuse(401, "GatedRepo")
        return self._send(repository.files[inside[0]], "application/octet-stream", repository, inside[0])

    def _listing(self, repository: Repository, name: str, action: str) -> object:
        if action == "revision":
            siblings = [{"rfilename": file} for file in repository.files]
            return {"id": name.removeprefix("datasets/"), "sha": repository.commit, "siblings": siblings}
        return [
            {"type": "file", "path": file, "size": len(content), "oid": _etag(content)}
            for file, content in repository.files.items()
        ]

    def _send(self, content: bytes, kind: str, repository: Repository | None = None, file: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if repository:
            self.send_header("ETag", f'"{_etag(content)}"')
            self.send_header("X-Repo-Commit", repository.commit)
        self.end_headers()
        if self.command == "HEAD":
            return
        if repository and repository.stalls_at == file and not self.served.go_on.is_set():
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.served.stalled.set()
            self.served.go_on.wait()
            self.close_connection = True
            return
        self.wfile.write(content)

    def _refuse(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
