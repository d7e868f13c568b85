"""Shares a search among processes, each with some of the windows and, where there are any, a GPU of its own.

Every process makes every decision from the same numbers in the same order, so the removals are those of one process.
The processes exchange only each window's divergences, as JSON: a few kilobytes a part from CPU memory to CPU memory,
which is why Gloo carries them between GPUs too.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from finercut.selection.blocks import Blocks
from finercut.selection.race import Part, Totals
from finercut.selection.sweep import MicroBatch, Sweep

Value = TypeVar("Value")
# Text, numbers and lists of them; a tuple arrives as a list.
Json = Any
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
# Where the processes that `start` started meet (those of torchrun do so at MASTER_ADDR), and who started them.
_MEETING = "FINERCUT_MEETING"
_LAUNCHER = "FINERCUT_LAUNCHER"


@dataclass(frozen=True)
class Ranks:
    """The processes of a search, of which this is one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those on this machine: the number of its GPU."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and logs."""
        return self.rank == 0

    def gather(self, value: Json) -> list[Json]:
        """Every process's value, by rank. As JSON: what another process sends is read, never run.

        Raises:
            RuntimeError: a process has ended.
        """
        if self.size == 1:
            return [value]
        try:
            return [json.loads(text) for text in _all_gather(json.dumps(value).encode(), self.size)]
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size} lost another one of this search; what was found is kept: "
                "run it again to continue"
            ) from error

    def least(self, sizes: MicroBatch) -> MicroBatch:
        """Sizes that fit every process. All use the same ones, since results depend on them in the last bits."""
        return MicroBatch(*map(min, zip(*self.gather(list(astuple(sizes))), strict=True)))


def _all_gather(mine: bytes, size: int) -> list[bytes]:
    """Every process's bytes, by rank."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(mine)]))
    longest = max(map(int, lengths))
    padded = torch.frombuffer(bytearray(mine.ljust(longest)), dtype=torch.uint8)
    received = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(received, padded)
    return [r[: int(n)].numpy().tobytes() for r, n in zip(received, lengths, strict=True)]


ALONE = Ranks()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the processes of this search; alone where no launcher started any.

    Raises:
        RuntimeError: the launcher has ended.
    """
    if not started():
        yield ALONE
        return
    # The launcher starts each in a session of its own. One that outlived a killed launcher would go on beside the next
    # search. The system ends it from here on; the launcher may have ended before.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(_LAUNCHER, str(os.getppid())) != str(os.getppid()):
        raise RuntimeError("what started this search has ended; what was found is kept: run it again to continue")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=os.environ.get(_MEETING), rank=rank, world_size=size)
    try:
        yield Ranks(rank, size, int(os.environ["LOCAL_RANK"]))
    finally:
        dist.destroy_process_group()


def started() -> bool:
    """Whether `start` or torchrun started this process."""
    return dist.is_torchelastic_launched()


def start(n_processes: int, arguments: Sequence[str]) -> None:
    """Run `python arguments` in processes of this machine that share their work, and wait for them.

    This is torchrun's launcher without its command: `torchrun --standalone` listens on every interface, and reports a
    failure in 40 lines for people to read.

    Raises:
        RuntimeError: one of them failed; the others have been ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        # They share this machine's cores, and talk over nothing but its loopback.
        environment = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n_processes))),
            "GLOO_SOCKET_IFNAME": "lo",
            # torch's TCP store would listen on every interface: launcher and processes meet in files.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            _MEETING: f"file://{folder}/processes",
            _LAUNCHER: str(os.getpid()),
        }
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/launcher",
            rdzv_configs={"store_type": "file"},
            local_addr="localhost",
            max_restarts=0,
        )
        try:
            with _environment(environment):
                elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            rank, failure = min(error.failures.items(), key=lambda failed: _consequence(failed[1].exitcode))
            how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"failed ({failure.exitcode})"
            raise RuntimeError(
                f"process {rank} of {n_processes} {how}; what was found is kept: run it again to continue"
            ) from error


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Run the block with these environment variables; torch's launcher passes its own on, and sets one itself."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for added in os.environ.keys() - before.keys():
            del os.environ[added]
        os.environ.update(before)


def _consequence(exitcode: int) -> tuple[bool, int]:
    """Sorts the process that was the reason first: the others lost it, or the launcher ended them."""
    return exitcode == -signal.SIGTERM, exitcode


class SharedSweep(Sweep):
    """A sweep over the windows of all processes. Window n is the (n // size)-th one of process n % size."""

    def __init__(self, ranks: Ranks, blocks: Blocks, tokens: Tensor, *args: Any, **kwargs: Any) -> None:
        """As `Sweep`, with the tokens of all windows."""
        super().__init__(blocks, tokens[ranks.rank :: ranks.size], *args, **kwargs)
        self.ranks = ranks

    def compared(self, windows: Sequence[int]) -> list[tuple[float, int]]:
        mine = [window for window in windows if self._is_mine(window)]
        found = super().compared([window // self.ranks.size for window in mine])
        everyone = _merged(self.ranks.gather(list(zip(mine, found, strict=True))))
        return [tuple(everyone[window]) for window in windows]

    def totals(self, part: Part) -> Totals:
        mine = [window for window in part if self._is_mine(window)]
        found = super().totals({window // self.ranks.size: part[window] for window in mine}) if mine else {}
        if self.ranks.size == 1:
            return found
        rows = [list(row.values()) for row in found.values()]
        everyone = _merged(self.ranks.gather(list(zip(mine, rows, strict=True))))
        return {window: dict(zip(row, map(tuple, everyone[window]), strict=True)) for window, row in part.items()}

    def _is_mine(self, window: int) -> bool:
        return window % self.ranks.size == self.ranks.rank


def _merged(shares: Iterable[list[tuple[int, Value]]]) -> dict[int, Value]:
    return {window: value for share in shares for window, value in share}
