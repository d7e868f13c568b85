"""The lineage of a checkpoint: the steps that made it from the whole model, in `finercut.lineage` of config.json."""

from __future__ import annotations

from typing import Any

import finercut
from finercut.model.configs import note
from finercut.model.directory import ModelDirectory
from finercut.system.records import Record


class LineageEntry(Record):
    """One step that changed the checkpoint."""

    step: str
    """prune, heal, ...: the name of the module in finercut.checkpoint that has the step and its claim."""
    parent_sha256: str
    """Of the weights that the step was given."""
    settings: dict[str, Any]
    """Of the step's section in params.yaml, or what the caller gave."""
    version: str
    """Of finercut."""
    n_tokens: int | None = None
    """That the step fitted the weights to, repeats included; not stored by steps that fit nothing."""
    tokens_sha256: str | None = None
    """Of those tokens, without repeats."""

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_defaults=True)


def entry(step: str, parent: ModelDirectory, settings: dict[str, Any], **data: Any) -> LineageEntry:
    """
    Args:
        data: the entry's optional fields.
    """
    sha256 = parent.weights_sha256
    return LineageEntry(step=step, parent_sha256=sha256, settings=settings, version=finercut.__version__, **data)


def lineage_of(model: ModelDirectory) -> list[LineageEntry]:
    """The steps in their order. Empty for a whole model, and for checkpoints of finercut 0.1, which record none."""
    origin = model.settings.get("finercut") or {}
    return [LineageEntry.model_validate(step) for step in origin.get("lineage", [])]


def append(model: ModelDirectory, step: LineageEntry) -> None:
    """Add a step to the config.json of a checkpoint that is being written."""
    origin = model.settings.get("finercut") or {}
    note(model.path, "finercut", origin | {"lineage": [*origin.get("lineage", []), step.to_json()]})
