"""The step `heal`: repairs a pruned checkpoint by one of the methods in `finercut.healing`.

The result has the parent's structure. It is never worse on held-out tokens: where a method finds nothing better, the
result is the parent.
"""

from __future__ import annotations

import importlib
import logging
import math
import shutil
import time
from pathlib import Path

from torch import Tensor

from finercut.checkpoint import lineage
from finercut.checkpoint.card import healed_card
from finercut.checkpoint.records import Claim, HealReport
from finercut.checkpoint.settings import Heal
from finercut.checkpoint.steps import Inputs, Proof, link_files
from finercut.checkpoint.writing import differing_tensors, write_tuned
from finercut.healing.fidelity import HeldOut, compare
from finercut.healing.task import Task, one_device
from finercut.model.devices import dtype_of
from finercut.model.directory import ModelDirectory
from finercut.tokens import Tokens

logger = logging.getLogger("finercut")


def apply(parent: ModelDirectory, directory: Path, settings: Heal, inputs: Inputs) -> HealReport:
    """Write the healed checkpoint; see `finercut.checkpoint.steps`.

    Where nothing better is found, it has the parent's own files, by a second name where the disk has links.

    Raises:
        FileNotFoundError: no tokens, or no whole model.
        ValueError: the method cannot be used with these settings or this model, the device is not here, or healing
            and held-out windows overlap.
        RuntimeError: the training diverged.
    """
    began = time.monotonic()
    tokens = inputs.tokens()
    tokens.check_vocabulary(parent.language.vocab_size)
    whole = inputs.whole.written_by("fetch")
    windows, sha256 = _windows(tokens)
    _check_disjoint(windows, tokens.held_out)
    sources, device = tokens.sources_of("held_out"), one_device(settings.device)
    dtype = dtype_of(settings.dtype, device)
    held_out = HeldOut(tokens.held_out, sources)
    task = Task(whole, parent, windows, held_out, device, dtype, inputs.work, inputs.on_metrics)
    unfinished = task.folder(settings)
    healed = importlib.import_module(f"finercut.healing.{settings.method}").heal(task, settings)
    del task, held_out  # and what the whole model predicts, in that dtype
    changed, candidates = [], [parent]
    if healed.parameters:
        write_tuned(parent, healed.parameters, directory)
        made = lineage.entry(
            "heal",
            parent,
            settings.model_dump(mode="json"),
            n_tokens=healed.n_tokens,
            tokens_sha256=sha256,
        )
        lineage.append(ModelDirectory(directory), made)
        child = ModelDirectory(directory)
        changed = differing_tensors(parent, child)
        candidates.append(child)
    found = compare(whole, candidates, tokens.held_out, sources, device)
    before, after = found[0], found[-1]
    if not after.divergence < before.divergence:
        logger.warning(
            "heal: held-out divergence did not fall below the pruned model's %.4f; the checkpoint stays as it is",
            before.divergence,
        )
        _empty(directory)
        link_files(parent.path, directory)
        changed, after = [], before
    else:
        readme = directory / "README.md"
        if readme.is_file():
            text = healed_card(readme.read_text(encoding="utf-8"), settings.method, healed.n_tokens, before, after)
            readme.write_text(text, encoding="utf-8")
    report = HealReport(
        method=settings.method,
        changed=changed,
        sha256=ModelDirectory(directory).weights_sha256,
        divergence_before=before.divergence,
        divergence_after=after.divergence,
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
        n_tokens=healed.n_tokens if changed else 0,
        seconds=time.monotonic() - began,
    )
    shutil.rmtree(unfinished, ignore_errors=True)
    logger.info(
        "heal: held-out divergence %.4f -> %.4f, perplexity %.2f -> %.2f, %d tensors changed, %.0f s",
        before.divergence,
        after.divergence,
        before.perplexity,
        after.perplexity,
        len(changed),
        report.seconds,
    )
    return report


def claim(parent: ModelDirectory, child: ModelDirectory, proof: Proof) -> Claim:
    """Where something was healed: the parent's structure, no difference but in the reported tensors, and a lower
    held-out divergence. Else the parent's weights and config.

    Raises:
        FileNotFoundError, ValueError: no report of the step.
        RuntimeError: logits that are not finite.
    """
    if [step.step for step in lineage.lineage_of(child)] == [step.step for step in lineage.lineage_of(parent)]:
        same = parent.weights_sha256 == child.weights_sha256 and parent.settings == child.settings
        return Claim(
            name="heal", statement="has the pruned checkpoint's weights, unchanged", holds=same, figures={}, limit=None
        )
    if proof.whole is None or proof.report is None:
        raise ValueError("the claim of a healed checkpoint is checked with the whole model and the step's report")
    report = HealReport.read(proof.report)
    try:
        unlisted = set(differing_tensors(parent, child)) - set(report.changed)
        same = _structure(parent) == _structure(child) and not unlisted
    except ValueError:
        same = False
    before, after = math.nan, math.nan
    if same:
        of_parent, of_child = compare(
            proof.whole, [parent, child], proof.held_out, proof.held_out_sources, proof.device, proof.weights_gib
        )
        before, after = of_parent.divergence, of_child.divergence
    return Claim(
        name="heal",
        statement="differs from the pruned checkpoint in the reported tensors only, and diverges less from the whole "
        "model on held-out tokens",
        holds=same and after < before and report.sha256 == child.weights_sha256,
        figures={"divergence_before": before, "divergence_after": after, "n_changed": len(report.changed)},
        limit=None,
    )


def _structure(model: ModelDirectory) -> dict:
    """config.json less the lineage."""
    origin = {key: value for key, value in model.settings["finercut"].items() if key != "lineage"}
    return model.settings | {"finercut": origin}


def _windows(tokens: Tokens) -> tuple[Tensor, str]:
    if tokens.healing is not None:
        return tokens.healing, tokens.healing_sha256
    logger.warning(
        "heal: the calibration set has no tokens for healing; taking its %d windows that the search has seen",
        len(tokens.calibration),
    )
    return tokens.calibration, tokens.calibration_sha256


def _check_disjoint(windows: Tensor, held_out: Tensor) -> None:
    judging = set(map(tuple, held_out.tolist()))
    shared = sum(tuple(window) in judging for window in windows.tolist())
    if shared:
        raise ValueError(
            f"{shared} of {len(windows)} windows to heal on are held-out windows too, which judge the result: take "
            "sources that repeat no text, and run `finercut calibrate` again"
        )


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
