"""Ending what was started, with everything it started.

Run as a script, it starts a command that ends, with everything in its process group, when whoever started the script
does: `python -m finercut.system.processes COMMAND ...`, as the leader of a group, with a pipe for its standard input.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

# Goes before a command that is not to outlive the process that starts it.
BOUND = (sys.executable, "-m", "finercut.system.processes")
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


def _main() -> None:
    threading.Thread(target=_watch, daemon=True).start()
    sys.exit(subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, check=False).returncode)


def _watch() -> None:
    # The pipe's other end is the starter's alone: it closes when the starter ends, whatever ended it. PR_SET_PDEATHSIG
    # would reach the command, but nothing that the command starts.
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _main()
