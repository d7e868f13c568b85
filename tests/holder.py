"""Another process that works in the current directory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOLD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from finercut.system.staging import exclusive
from pipelines import paths
with exclusive(paths.WORK):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding() -> Iterator[subprocess.Popen]:
    """It holds the workspace until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.stdin.close()
