"""Writes the page about one execution, and the one that compares two: of workspaces, or of registered versions."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from finercut.report import comparison, inputs, page
from finercut.system.staging import staged_file

from . import paths


def write(what: str | None, output: Path) -> None:
    """
    Args:
        what: models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID or a directory; None for this workspace

    Raises:
        ValueError: a report is missing or of another form, or `what` names nothing.
        RuntimeError: MLflow does not have the version or the run.
    """
    found = _of_directory(Path(), "this workspace") if what is None else _read(what)
    _write(page.html(found), output)


def default(what: str | None) -> Path:
    """Where the page of `what` goes: not onto this workspace's, which is the output of a stage."""
    if what is None:
        return paths.PAGE
    page = paths.REPORTS / f"{re.sub(r'[^A-Za-z0-9.]+', '-', _name(what))}.html"
    return page.with_stem(f"of-{page.stem}") if page in (paths.PAGE, paths.COMPARISON) else page


def compare(one: str, other: str, output: Path) -> comparison.Comparison:
    """Write the page about two, each named as in `write`.

    Raises:
        ValueError, RuntimeError: as `write`.
    """
    found = comparison.Comparison((_name(one), _name(other)), (_read(one), _read(other)))
    _write(comparison.html(found), output)
    return found


def _write(html: str, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(output) as partial:
        partial.write_text(html, encoding="utf-8")


def _read(what: str) -> inputs.Inputs:
    if Path(what).is_dir():
        return _of_directory(Path(what), what)
    if run := re.fullmatch(r"(?:runs:/)?([0-9a-f]{32})", what):
        return _of_run(run[1], what)
    if what.startswith("models:"):
        return _of_version(what)
    raise ValueError(
        f"{what!r} names no version, run or folder; write models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID or a path"
    )


def _name(what: str) -> str:
    return Path(what).resolve().name if Path(what).is_dir() else what


def _of_directory(root: Path, whose: str) -> inputs.Inputs:
    """Of a workspace, or of a version that was downloaded."""
    return inputs.read([root / paths.REPORTS, root / paths.TRAJECTORY.parent, root / "evidence", root], whose)


def _of_version(uri: str) -> inputs.Inputs:
    from finercut.registry import versions

    reference = versions.VersionReference.parse(uri)
    version = versions.find(versions.connect(reference.name), reference)
    with tempfile.TemporaryDirectory() as folder:
        return inputs.read([versions.download(version, "evidence", Path(folder))], uri)


def _of_run(run_id: str, whose: str) -> inputs.Inputs:
    from finercut.registry import runs

    with tempfile.TemporaryDirectory() as folder:
        return inputs.read(runs.download(run_id, ("reports", "pipeline"), Path(folder)), whose)
