"""Measures one model: tasks in lm-eval, and perplexity on the held-out tokens."""

from __future__ import annotations

import logging

import lm_eval
import torch
import transformers

from finercut.evaluation import samples
from finercut.evaluation.doubts import doubts
from finercut.evaluation.harness import fit, load_tasks, score
from finercut.evaluation.records import Measured
from finercut.evaluation.redundancy import redundancy
from finercut.evaluation.settings import Evaluate
from finercut.model.devices import device_of, dtype_of
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load_on
from finercut.tokens import Tokens

logger = logging.getLogger("finercut")


def measure(
    name: str, directory: ModelDirectory, tokens: Tokens, settings: Evaluate, *, judged: bool = False
) -> Measured:
    """
    Args:
        name: of the model, for the log.
        judged: look for what speaks against the whole model, and warn of it; and for what in it is redundant.

    Raises:
        FileNotFoundError: no model there.
        ValueError: a task, metric or device that does not exist, tokens of another vocabulary, or prompts beyond the
            model's context.
        RuntimeError: a task's documents cannot be had, or logits are not finite.
    """
    tokens.check_vocabulary(directory.language.vocab_size)
    device = device_of(settings.device)
    dtype = dtype_of(settings.dtype, device)
    tasks = load_tasks(settings.tasks)
    samples.check(settings.samples, directory)
    model = load_on(directory, dtype, settings.device, settings.weights_gib)
    found = fit(model, directory.tokenizer, tokens.held_out, tokens.sources_of("held_out"))
    logger.info("evaluate: %s model, perplexity %.2f, %.3f bits/byte", name, found.perplexity, found.bits_per_byte)
    scores = {}
    options = {"seed": settings.seed, "batch_size": settings.batch_size}
    for task, reached in score(model, directory.tokenizer, tasks, **options):
        scores[task] = reached
        logger.info("evaluate: %s model, %s %.3f (%d samples)", name, task, reached.value, reached.n_samples)
    found_wrong = doubts(model, directory.tokenizer, tokens.held_out, found, scores) if judged else []
    for doubt in found_wrong:
        logger.warning("evaluate: THE WHOLE MODEL MAY BE BROKEN, and no figure beside it means anything: %s", doubt)
    written = samples.write(model, directory.tokenizer, settings.samples)
    for sample in written:
        logger.info("evaluate: %s model, %.0f %% repeated after %r", name, 100 * sample.repetition, sample.prompt[:40])
    looked_at = []
    if judged and settings.alone_tokens:
        looked_at = redundancy(model, tokens.calibration, settings.alone_tokens)
        logger.info("evaluate: %s model, %d sublayers removed alone", name, len(looked_at))
    return Measured(
        sha256=directory.weights_sha256,
        dtype=str(dtype).removeprefix("torch."),
        perplexity=found.perplexity,
        bits_per_byte=found.bits_per_byte,
        perplexity_by_source=found.perplexity_by_source,
        held_out_sha256=tokens.held_out_sha256,
        tasks=scores,
        tasks_sha256=settings.tasks_sha256,
        doubts=tuple(found_wrong),
        samples=tuple(written),
        sublayers=tuple(looked_at),
        lm_eval_version=lm_eval.__version__,
        transformers_version=transformers.__version__,
        torch_version=torch.__version__,
    )
