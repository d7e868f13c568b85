"""Stage `prove`: checks the claim of every step on the checkpoint, and that vLLM serves what transformers computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
import transformers

from finercut.checkpoint.records import Claim, ProveReport
from finercut.checkpoint.steps import Proof, step
from finercut.model.devices import device_of
from finercut.model.directory import ModelDirectory
from finercut.serving import claim as serving
from finercut.serving import vllm_engine
from finercut.tokens import Tokens, load_tokens

from . import paths, steps
from .params import Params

logger = logging.getLogger("finercut")


def run(params: Params) -> ProveReport:
    """
    Raises:
        FileNotFoundError: a checkpoint or the calibration set is missing.
        ValueError: vLLM has no model of this kind.
        RuntimeError: vLLM is missing or failed, or a claim does not hold; the report says which.
    """
    engine = vllm_engine.installed()
    tokens = load_tokens(paths.CALIBRATION)
    whole = ModelDirectory(paths.MODEL).written_by("fetch")
    for name, _, child in steps.chain():
        child.written_by(name)
    tokens.check_vocabulary(whole.language.vocab_size)
    vllm_engine.check_servable(whole)
    paths.report("prove").unlink(missing_ok=True)
    claims = []
    for claim in _claims(params, tokens):
        claims.append(claim)
        measured = ", ".join(f"{figure} {value:.3g}" for figure, value in claim.figures.items())
        logger.log(
            logging.INFO if claim.holds else logging.ERROR,
            "prove: %s %s: %s%s",
            claim.name,
            "holds" if claim.holds else "DOES NOT HOLD",
            claim.statement,
            f" ({measured})" if measured else "",
        )
    report = ProveReport(
        claims=claims,
        sha256=ModelDirectory(paths.FINAL).weights_sha256,
        engine=engine,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
    )
    report.write(paths.report("prove"))
    if failed := [claim for claim in claims if not claim.holds]:
        found = "; ".join(f"{c.name} ({c.statement}): {c.figures}, allowed {c.limit}" for c in failed)
        raise RuntimeError(f"not proved: {found}. {_remedy(failed[0].name)}")
    return report


def _remedy(claim: str) -> str:
    if claim in paths.CHAIN:
        return f"Run `finercut {claim}` again"
    if claim == "serve_whole":
        return "vLLM computes something else with the whole model too: take another version of it, or another model"
    return "vLLM computes the whole model as transformers does, but not this checkpoint: change what made it"


def _claims(params: Params, tokens: Tokens) -> Iterator[Claim]:
    settings = params.prove
    device = device_of(settings.device)
    for name, parent, child in steps.chain():
        proof = Proof(
            tokens.held_out,
            settings.logit_tolerance,
            device,
            settings.weights_gib,
            whole=ModelDirectory(paths.MODEL),
            report=paths.report(name),
        )
        yield step(name).claim(parent, child, proof)
    # The whole model is the control: a difference that both show is vLLM's, not ours.
    yield serving.claim("serve_whole", ModelDirectory(paths.MODEL), tokens.held_out, settings)
    yield serving.claim("serve", ModelDirectory(paths.FINAL), tokens.held_out, settings)
