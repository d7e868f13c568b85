"""A headless Chromium, asked through its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_S = 60


def found() -> str | None:
    """The program, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Page:
    """One tab."""

    connection: ClientConnection
    numbers: Iterator[int] = field(default_factory=itertools.count)
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for."""
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console, and exceptions."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self.connection.recv(timeout=PATIENCE_S))
        told = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif message.get("method") == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
            self.complaints.append(str(told["args"]))
        elif message.get("method") == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        return message

    def open(self, address: str, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of this many CSS pixels, and wait until it has loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.requests.clear()
        self.complaints.clear()
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + PATIENCE_S
        while self.value("document.readyState") != "complete":
            assert time.monotonic() < deadline, f"{address} does not load"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """Of an expression in JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, path: Path, whole: bool = False) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A tab of a new Chromium with an empty profile."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox needs another user
        command = [found(), "--headless", *root, "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options = ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            line = next(line for line in process.stderr if "DevTools listening on" in line)
            address = re.search(r"ws://\S+", line)[0]
            yield from _tab(address)
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


def _tab(address: str) -> Iterator[Page]:
    from urllib.request import urlopen

    host = address.removeprefix("ws://").partition("/")[0]
    tabs = json.load(urlopen(f"http://{host}/json/list"))
    tab = next(tab for tab in tabs if tab["type"] == "page")
    with connect(tab["webSocketDebuggerUrl"], max_size=None) as connection:
        page = Page(connection)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        yield page
