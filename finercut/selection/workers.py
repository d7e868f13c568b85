"""Independent pieces of work, done at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Runs independent pieces of work at once: a thread a core on a CPU, none beside the caller's on a GPU.

    Torch's own threads meet after every operation, thousands of times a second, and wait for the slowest each time;
    on a machine that does other things too, that costs far more than the other things do. These meet after a piece.
    """

    def __init__(self, device: torch.device) -> None:
        n_threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._inside = threading.local()
        self._pool = ThreadPoolExecutor(n_threads, initializer=self._enter) if n_threads > 1 else None
        self.n_threads = n_threads

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
