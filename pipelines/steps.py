"""Runs one step of the chain of checkpoints: the parent's directory in, the step's own out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from finercut.checkpoint.steps import Inputs, keep, step
from finercut.model.directory import ModelDirectory
from finercut.registry import live
from finercut.selection.selection import Selection
from finercut.system.records import Record
from finercut.system.staging import staged

from . import paths
from .params import Params

if TYPE_CHECKING:
    from finercut.tokens import Tokens

logger = logging.getLogger("finercut")


def chain() -> list[tuple[str, ModelDirectory, ModelDirectory]]:
    """Every step with its parent and its result, in order."""
    directories = [paths.MODEL, *paths.CHAIN.values()]
    return [
        (name, ModelDirectory(parent), ModelDirectory(child))
        for name, parent, child in zip(paths.CHAIN, directories, directories[1:], strict=False)
    ]


def parent_of(name: str) -> ModelDirectory:
    """What a step is given.

    Raises:
        FileNotFoundError: the step before it has not run.
    """
    names = ["fetch", *paths.CHAIN]
    before = names[names.index(name) - 1]
    return ModelDirectory({"fetch": paths.MODEL, **paths.CHAIN}[before]).written_by(before)


def read_selection() -> Selection:
    """
    Raises:
        FileNotFoundError: the search has not run.
    """
    return Selection.read(paths.SELECTION)


def run(name: str, params: Params, **more: Any) -> Record:
    """Run a step and write its checkpoint. The caller, or `run_and_report`, writes its report.

    Args:
        more: fields of the step's `Inputs` that all others leave as they are.

    Raises:
        FileNotFoundError: its parent, or another input, is missing.
        ValueError: they do not belong together, or the step cannot be done with its settings.
    """
    inputs = Inputs(
        tokens=_tokens,
        selection=read_selection,
        whole=ModelDirectory(paths.MODEL),
        work=paths.WORK / name,
        on_metrics=live.log_metrics,
        **more,
    )
    parent, settings = parent_of(name), getattr(params, name)
    _ = parent.tensors  # a file that was cut short is not handed on
    if not parent.has_tokenizer:
        raise FileNotFoundError(f"{parent} has no tokenizer: make it again, `finercut fetch` and what follows")
    with staged(paths.CHAIN[name]) as directory:
        if getattr(settings, "method", None) == "none":
            record = keep(parent, directory)
        else:
            record = step(name).apply(parent, directory, settings, inputs)
        live.finish()
        # Remove the stale report first, so that a crash cannot leave it beside the new checkpoint.
        paths.report(name).unlink(missing_ok=True)
    return record


def _tokens() -> Tokens:
    from finercut.tokens import load_tokens  # imports torch, which a step that keeps its parent does without

    return load_tokens(paths.CALIBRATION)


def run_and_report(name: str, params: Params) -> Record:
    """A stage that is a step and nothing else. Raises as `run` does."""
    record = run(name, params)
    record.write(paths.report(name))
    logger.info("%s: %s", name, paths.CHAIN[name])
    return record
