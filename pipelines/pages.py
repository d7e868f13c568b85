"""Writes the page about one execution: the one in this workspace, or a registered version's."""

from __future__ import annotations

import tempfile
from pathlib import Path

from finercut.report import inputs, page
from finercut.system.staging import staged_file

from . import paths


def write(what: str | None, output: Path) -> None:
    """
    Args:
        what: models:/NAME@ALIAS or models:/NAME/VERSION; None for this workspace

    Raises:
        ValueError: a report is missing or of another form, or `what` names no version.
        RuntimeError: MLflow does not have the version.
    """
    if what is None:
        found = inputs.read([paths.REPORTS, paths.TRAJECTORY.parent, paths.PARAMS.parent], "this workspace")
    else:
        found = _of_version(what)
    output.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(output) as partial:
        partial.write_text(page.html(found), encoding="utf-8")


def _of_version(uri: str) -> inputs.Inputs:
    from finercut.registry import versions

    reference = versions.VersionReference.parse(uri)
    version = versions.find(versions.connect(reference.name), reference)
    with tempfile.TemporaryDirectory() as folder:
        return inputs.read([versions.download(version, "evidence", Path(folder))], uri)
