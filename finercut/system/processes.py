"""Starts a process in a group of its own, and terminates it with all its descendants.

As a script, `python -m finercut.system.processes COMMAND ...` runs a command and kills its own process group as soon as
the process that started the script has ended. It must lead that group, and its standard input must be a pipe.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

# Before a command: it does not outlive the process that starts it.
BOUND = (sys.executable, "-m", "finercut.system.processes")
# Between SIGTERM and SIGKILL.
GRACE_S = 10.0


def start_group(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a command as the leader of a group that ends with this process, with one pipe for all it says.

    Whoever calls ends it by `end_group` and closes its standard input.
    """
    return subprocess.Popen(
        [*BOUND, *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def end_group(process: subprocess.Popen) -> None:
    """Terminate every process of the group that `process` leads (`start_new_session=True`), and kill what is left.

    The leader's children, which hold the accelerator, would survive its death. Whoever interrupts the wait has them
    killed at once.
    """
    for sent in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        try:
            os.killpg(process.pid, sent)
            while time.monotonic() < deadline:
                process.poll()  # a leader that has ended stays in its group until it is reaped
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return
        except KeyboardInterrupt:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


@contextmanager
def withheld(*signals: signal.Signals) -> Iterator[None]:
    """Deliver these to this process afterwards, and never to those that it starts meanwhile: a terminal sends them to
    all of a group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def interrupt_on_end() -> None:
    """Have a supervisor's SIGTERM and a closed terminal's SIGHUP end this process as Ctrl-C does: what it started ends,
    and what it recorded is closed. Not where they are ignored, as `nohup` has it."""
    for sent in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sent) is not signal.SIG_IGN:
            signal.signal(sent, signal.default_int_handler)


def _main() -> None:
    threading.Thread(target=_watch, daemon=True).start()
    sys.exit(subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, check=False).returncode)


def _watch() -> None:
    # Only the starter has the pipe's other end, so it closes when the starter ends, for whatever reason.
    # PR_SET_PDEATHSIG would kill the command, but not the processes that the command starts.
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _main()
