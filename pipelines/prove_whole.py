"""Stage `prove_whole`: vLLM serves what transformers computes with the whole model, which is known before the search.

It is the control of `prove` too: a difference that the whole model shows as well is vLLM's, not ours.
"""

from __future__ import annotations

from collections.abc import Iterator

from finercut.checkpoint.records import Claim, ProveReport
from finercut.model.directory import ModelDirectory
from finercut.serving import claim as serving
from finercut.serving import vllm_engine
from finercut.tokens import Tokens, load_tokens

from . import claims, paths
from .params import Params


def run(params: Params) -> ProveReport:
    """
    Raises:
        FileNotFoundError: the model or the calibration set is missing.
        ValueError: vLLM has no model of this kind.
        RuntimeError: vLLM is missing or failed, or computes something else; the report says how far off.
    """
    engine = vllm_engine.installed()
    tokens = load_tokens(paths.CALIBRATION)
    model = ModelDirectory(paths.MODEL).written_by("fetch")
    tokens.check_vocabulary(model.language.vocab_size)
    vllm_engine.check_servable(model)
    return claims.check("prove_whole", _claims(params, model, tokens), model, engine)


def _claims(params: Params, model: ModelDirectory, tokens: Tokens) -> Iterator[Claim]:
    yield serving.claim("serve_whole", model, tokens.held_out, params.prove)
