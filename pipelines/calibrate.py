"""Stage `calibrate`: the model's tokenizer and a text source in, calibration and held-out tokens out."""

from __future__ import annotations

import logging

from finercut.model.directory import ModelDirectory
from finercut.sources import revisions
from finercut.sources.records import CalibrateReport
from finercut.sources.texts import read_texts
from finercut.sources.windows import cut_windows, tokenizer_sha256, window_start
from finercut.system.staging import staged
from finercut.tokens import write_tokens

from . import paths
from .params import Params

logger = logging.getLogger("finercut")


def is_stale(params: Params) -> bool:
    """Whether a text file was edited after the windows were cut from it: DVC knows its path alone."""
    path = paths.report("calibrate")
    if not path.is_file():
        return False
    try:
        return revisions.changed(params.calibrate.source, CalibrateReport.read(path).revision)
    except ValueError:
        return True  # another version wrote it


def run(params: Params) -> CalibrateReport:
    """
    Raises:
        FileNotFoundError: no model, or no such text file.
        ValueError: too little text, text that cannot be read, windows longer than the model's context, or a tokenizer
            that is not the model's.
        RuntimeError: the hub gives no access or no answer.
    """
    settings = params.calibrate
    model = ModelDirectory(paths.MODEL).written_by("fetch")
    config = model.language
    if settings.n_tokens > config.max_position_embeddings:
        raise ValueError(
            f"calibrate.n_tokens = {settings.n_tokens} is more than the model's context of "
            f"{config.max_position_embeddings} tokens"
        )
    tokenizer = model.tokenizer
    _check_tokenizer(len(tokenizer), config.vocab_size)
    texts = read_texts(settings.source)
    tokens = cut_windows(
        texts,
        tokenizer,
        n_tokens=settings.n_tokens,
        n_samples=settings.n_samples,
        n_held_out_samples=settings.n_held_out_samples,
        shuffle_seed=settings.shuffle_seed,
    )
    highest = max(int(tokens.calibration.max()), int(tokens.held_out.max()))
    if highest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer in {paths.MODEL} makes token {highest}, the model has {config.vocab_size}: "
            "it is not the model's, fetch the model with its own"
        )
    report = CalibrateReport(
        source=texts.source,
        revision=texts.revision,
        n_documents=len(texts.documents),
        n_characters=sum(map(len, texts.documents)),
        n_samples=settings.n_samples,
        n_tokens=settings.n_tokens,
        n_held_out_samples=settings.n_held_out_samples,
        calibration_sha256=tokens.calibration_sha256,
        held_out_sha256=tokens.held_out_sha256,
        tokenizer_sha256=tokenizer_sha256(paths.MODEL),
        bos=bool(window_start(tokenizer)),
    )
    with staged(paths.CALIBRATION) as directory:
        write_tokens(directory, tokens, report.model_dump(include={"source", "revision", "tokenizer_sha256"}))
        # Remove the stale report first, so that a crash cannot leave it beside the new windows.
        paths.report("calibrate").unlink(missing_ok=True)
    report.write(paths.report("calibrate"))
    logger.info(
        "calibrate: %d calibration and %d held-out windows of %d tokens from %s (%d documents, %.0f kB)%s",
        report.n_samples,
        report.n_held_out_samples,
        report.n_tokens,
        report.source,
        report.n_documents,
        report.n_characters / 1e3,
        ", each with BOS" if report.bos else "",
    )
    return report


def _check_tokenizer(n_entries: int, vocab_size: int) -> None:
    # Embeddings are padded by a few percent, never to twice the vocabulary.
    if n_entries < vocab_size / 2:
        raise ValueError(
            f"the tokenizer in {paths.MODEL} has {n_entries} entries, the model {vocab_size}: it is not the model's, "
            "fetch the model with its own"
        )
