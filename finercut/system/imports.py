"""Imports of large libraries."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Import without garbage collections: they find nothing, and look through all modules so often that transformers or
    vLLM take a quarter longer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def freeze_imports() -> None:
    """Keep what is in memory out of later garbage collections, each of which would look through all of it."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # nanobind calls what is frozen at the end leaked
