"""Checks a registered version's downloaded files: their hashes, and the claim of pruning once more."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path

import torch
from mlflow.entities.model_registry import ModelVersion

from finercut.checkpoint.lineage import lineage_of
from finercut.checkpoint.parity import check_parity
from finercut.model.devices import device_of
from finercut.model.directory import ModelDirectory
from finercut.model.tensors import is_weights, weights_sha256
from finercut.registry import evidence, versions
from finercut.registry.evidence import Evidence
from finercut.registry.records import Check
from finercut.registry.versions import PRUNED_MD5
from finercut.sources.corrections import settle
from finercut.sources.files import LEGAL
from finercut.sources.models import fetch_model
from finercut.sources.settings import HubModel

from . import paths
from .params import Params

logger = logging.getLogger("finercut")

WORK = paths.WORK / "promote"
N_SAMPLES, N_TOKENS = 4, 64
SUFFIXES = {".json", ".safetensors", ".jinja", ".model", ".txt", ".md", ".py"}


def files(params: Params, version: ModelVersion, recorded: Evidence) -> list[Check]:
    """Download the checkpoint and check it: its hashes against the evidence, its logits against the whole model's.

    Raises:
        RuntimeError: the checkpoint or its whole model cannot be downloaded.
        ValueError: it is no checkpoint of finercut's.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        checkpoint = versions.download(version, versions.CHECKPOINT, Path(folder))
        checks = [
            _known_files(checkpoint),
            _same("weights_sha256", weights_sha256(checkpoint), recorded.sha256),
            _same("files_md5", directory_md5(checkpoint), version.tags.get(PRUNED_MD5, "unknown")),
        ]
        if not all(check.passed for check in checks):
            # Files that differ from those registered are not loaded.
            return checks
        if later := [step.step for step in lineage_of(ModelDirectory(checkpoint)) if step.step != "prune"]:
            reason = f"the files are those that were proved; {', '.join(later)} changed the weights after pruning"
            return [*checks, Check(name="proved", value=None, passed=True, reason=reason)]
        whole = _whole_model(version, recorded, Path(folder))
        logger.info("promote: repeating the parity check on the downloaded files")
        report = check_parity(
            ModelDirectory(whole),
            ModelDirectory(checkpoint),
            _any_tokens(checkpoint, recorded),
            params.prove.logit_tolerance,
            device_of(params.prove.device),
            params.prove.weights_gib,
        )
    largest = max(report.max_logit_difference, report.max_logit_difference_cached)
    reason = f"repeated parity is {largest:.4g}; at most {report.tolerance:.4g} is "
    again = Check(
        name="parity_again",
        value=largest,
        limit=report.tolerance,
        passed=report.passed,
        reason=reason + _outcome(report.passed),
    )
    return [*checks, again]


def _outcome(passed: bool) -> str:
    return "met" if passed else "required"


def _known_files(checkpoint: Path) -> Check:
    """Whether all files are of kinds that no loader unpickles."""
    strange = sorted(path.name for path in checkpoint.rglob("*") if path.is_file() and not _is_known(path))
    reason = (
        f"the checkpoint holds {', '.join(strange)}" if strange else "the checkpoint holds known kinds of files only"
    )
    return Check(name="files", value=len(strange), passed=not strange, reason=reason)


def _is_known(path: Path) -> bool:
    legal = LEGAL.fullmatch(path.name) is not None and not is_weights(path.name.lower())
    return path.suffix in SUFFIXES or legal


def _same(name: str, found: str, expected: str) -> Check:
    passed = found == expected
    reason = f"{name} of the downloaded checkpoint is {found[:12]}, {expected[:12]} is {_outcome(passed)}"
    return Check(name=name, value=None, passed=passed, reason=reason)


def directory_md5(directory: Path) -> str:
    """The hash over all its files, as DVC's lock file records it for an output."""
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    listed = [{"md5": _md5(directory / name), "relpath": name} for name in names]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _whole_model(version: ModelVersion, recorded: Evidence, folder: Path) -> Path:
    """The workspace's, if it has the recorded hash; otherwise fetched again from its source."""
    expected = recorded.fetch.sha256
    if (paths.MODEL / "config.json").is_file() and weights_sha256(paths.MODEL) == expected:
        return paths.MODEL
    source = evidence.source_of_whole(versions.download(version, "evidence", folder), recorded.version).source
    if isinstance(source, HubModel):
        source = source.model_copy(update={"revision": recorded.fetch.revision})
    logger.info("promote: %s holds another model; fetching %s again", paths.MODEL, recorded.fetch.source)
    directory = folder / "whole"
    directory.mkdir()
    try:
        origin = fetch_model(source, directory, folder / "fetch")
        found = settle(directory, origin.source).weights_sha256
    except (OSError, ValueError, RuntimeError) as error:
        raise RuntimeError(f"the whole model of version {recorded.version} cannot be had again: {error}") from error
    if found != expected:
        raise RuntimeError(
            f"the whole model of version {recorded.version} is no longer what it was: weights sha256 {found[:12]} "
            f"instead of {expected[:12]} from {recorded.fetch.source}"
        )
    return directory


def _any_tokens(checkpoint: Path, recorded: Evidence) -> torch.Tensor:
    """(samples, tokens) ids drawn at random: parity has to hold on any, and the held-out ones may be elsewhere."""
    vocab_size = ModelDirectory(checkpoint).language.vocab_size
    n_tokens = min(N_TOKENS, recorded.fetch.max_position_embeddings)
    return torch.randint(vocab_size, (N_SAMPLES, n_tokens), generator=torch.Generator().manual_seed(0))
