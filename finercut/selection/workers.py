"""Runs independent pieces of work in parallel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Runs independent pieces of work in parallel: a thread a core on a CPU, only the caller's on a GPU.

    Torch's own threads synchronise after every operation, thousands of times a second, and wait for the slowest; on a
    machine that does other things too, that costs more than those things do. These synchronise after a piece. At the
    end of the block the threads are gone and torch's number of threads is what it was.
    """

    def __init__(self, device: torch.device) -> None:
        n_threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._inside = threading.local()
        self._pool = ThreadPoolExecutor(n_threads, initializer=self._enter) if n_threads > 1 else None
        self.n_threads = n_threads

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            # For the BLAS, which counts threads for the whole process.
            torch.set_num_threads(self.n_threads)

    def _enter(self) -> None:
        self._inside.worker = True
        torch.set_num_threads(1)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results in the order of the items. Called from within a piece of work, does one after the other."""
        items = list(items)
        if self._pool is None or len(items) < 2 or getattr(self._inside, "worker", False):
            return [function(item) for item in items]

        def piece(item: Item) -> Result:
            with torch.inference_mode():
                return function(item)

        return list(self._pool.map(piece, items))
