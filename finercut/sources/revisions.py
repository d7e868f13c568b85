"""Revisions of sources that are files on this machine: hashes of what is taken from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from finercut.model.tensors import INDEX, weights_sha256
from finercut.sources.files import choose, matching, names_in
from finercut.sources.settings import FilesText, HubModel, HubText, LocalModel, ModelText, PackageModel, PackageText

Source = PackageModel | HubModel | LocalModel | PackageText | HubText | FilesText | ModelText


def current(source: Source) -> str | None:
    """What `fetch` or `calibrate` would record as the revision now.

    Returns:
        None for a source that its settings pin, or whose files are not there.
    """
    try:
        if isinstance(source, LocalModel):
            trusted = source.trust_remote_code is not None
            taken = choose(names_in(source.path), str(source.path), trusted, source.path / INDEX)
            return of_model(source.path, taken)
        if isinstance(source, FilesText):
            return of_files(matching(source.paths))
    except (OSError, ValueError):
        return None
    return None


def changed(source: Source, recorded: str) -> bool:
    """Whether the files behind `source` are others than those of the recorded revision; False where nobody can say."""
    now = current(source)
    return now is not None and now != recorded


def of_model(directory: Path, taken: Iterable[str]) -> str:
    """Over the contents of a model's files that are taken."""
    names = sorted(taken)
    digest = hashlib.sha256(weights_sha256(directory, [n for n in names if n.endswith(".safetensors")]).encode())
    for name in names:
        if not name.endswith(".safetensors"):
            digest.update(f"{name}\n".encode() + (directory / name).read_bytes())
    return digest.hexdigest()


def of_files(files: Iterable[Path]) -> str:
    """Over the contents of text files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
