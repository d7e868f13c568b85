"""Stage `prove`: checks the claim of every step on the checkpoint, and that vLLM serves what transformers computes."""

from __future__ import annotations

from collections.abc import Iterator

from finercut.checkpoint.records import Claim, ProveReport
from finercut.checkpoint.steps import Proof, step
from finercut.model.devices import device_of
from finercut.model.directory import ModelDirectory
from finercut.serving import claim as serving
from finercut.serving import vllm_engine
from finercut.tokens import Tokens, load_tokens

from . import claims, paths, steps
from .params import Params


def run(params: Params) -> ProveReport:
    """
    Raises:
        FileNotFoundError: a checkpoint, the calibration set or the whole model's proof is missing.
        ValueError: the whole model's proof is of another model.
        RuntimeError: vLLM is missing or failed, or a claim does not hold; the report says which.
    """
    engine = vllm_engine.installed()
    tokens = load_tokens(paths.CALIBRATION)
    whole = ModelDirectory(paths.MODEL).written_by("fetch")
    for name, _, child in steps.chain():
        child.written_by(name)
    tokens.check_vocabulary(whole.language.vocab_size)
    made = _claims(params, tokens, _control(whole))
    return claims.check("prove", made, ModelDirectory(paths.FINAL), engine)


def _control(whole: ModelDirectory) -> list[Claim]:
    """What `prove_whole` found."""
    path = paths.report("prove_whole")
    control = ProveReport.read(path)
    if control.sha256 != whole.weights_sha256:
        raise ValueError(f"{path} is of another model than {whole}: run `finercut prove_whole` again")
    if not control.holds:
        raise RuntimeError(f"{path} has a claim that does not hold: vLLM does not compute what transformers does")
    return control.claims


def _claims(params: Params, tokens: Tokens, control: list[Claim]) -> Iterator[Claim]:
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
            held_out_sources=tokens.sources_of("held_out"),
        )
        yield step(name).claim(parent, child, proof)
    yield from control
    yield serving.claim("serve", ModelDirectory(paths.FINAL), tokens.held_out, settings)
