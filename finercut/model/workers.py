"""Runs independent pieces of work in parallel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_START_S = 60


class Workers:
    """Runs independent pieces of work in parallel: a thread a core on a CPU, only the caller's on a GPU.

    Torch's own threads synchronise after every operation, thousands of times a second, and wait for the slowest; on a
    machine that does other things too, that costs more than those things do. These synchronise after a piece. At the
    end of the block the threads are gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.n_threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._inside = threading.local()
        self._pool = single_threaded(self.n_threads) if self.n_threads > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results in the order of the items. Called from within a piece of work, does one after the other."""
        items = list(items)
        if self._pool is None or len(items) < 2 or getattr(self._inside, "worker", False):
            return [function(item) for item in items]

        def piece(item: Item) -> Result:
            self._inside.worker = True
            with torch.inference_mode():
                return function(item)

        return list(self._pool.map(piece, items))


def single_threaded(n_threads: int) -> ThreadPoolExecutor:
    """A pool of threads in each of which torch computes on that thread alone. No other thread is affected.

    `torch.set_num_threads` sets the calling thread's number and also the one that new threads take over when they first
    compute. So all threads of the pool are started here, and then the number for new threads is put back.
    """
    pool = ThreadPoolExecutor(n_threads)
    together = threading.Barrier(n_threads, timeout=_START_S)

    def enter() -> int:
        together.wait()  # so that each thread of the pool enters once
        taken_over = torch.get_num_threads()  # asked for the first time, it is no longer taken over later
        together.wait()
        torch.set_num_threads(1)
        return taken_over

    before = [entered.result() for entered in [pool.submit(enter) for _ in range(n_threads)]]
    # In a thread of its own, for the caller's number may be another one.
    restore = threading.Thread(target=torch.set_num_threads, args=(before[0],))
    restore.start()
    restore.join()
    return pool
