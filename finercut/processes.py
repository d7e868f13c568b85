"""Ending what was started, with everything it started."""

from __future__ import annotations

import os
import signal
import subprocess
import time

# A process that is asked to end is given this long; then it is killed.
GRACE_S = 10.0


def end_group(process: subprocess.Popen) -> None:
    """End every process of the group that `process` leads (`start_new_session=True`), politely first.

    To end the leader alone would leave its children, and the accelerator with them.
    """
    for sent in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        try:
            os.killpg(process.pid, sent)
            while time.monotonic() < deadline:
                process.poll()  # a leader that has ended stays in its group until it is waited for
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return
