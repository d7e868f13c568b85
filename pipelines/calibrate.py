"""Stage `calibrate`: the model's tokenizer and texts in; calibration, held-out and healing tokens out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from finercut.model.directory import ModelDirectory
from finercut.sources import revisions
from finercut.sources.generation import beginnings, model_texts
from finercut.sources.records import CalibrateReport, CalibrationSource
from finercut.sources.settings import Calibrate, ModelText, Portion
from finercut.sources.texts import Texts, read_texts
from finercut.sources.windows import Cut, cut_windows, tokenizer_sha256
from finercut.system.staging import staged
from finercut.tokens import Tokens, passages, window_start, write_tokens

from . import paths
from .params import Params

logger = logging.getLogger("finercut")


def is_stale(params: Params) -> bool:
    """Whether a text file was edited after the windows were cut from it: DVC knows its path alone."""
    path = paths.report("calibrate")
    if not path.is_file():
        return False
    try:
        report = CalibrateReport.read(path)
    except ValueError:
        return True  # another version wrote it
    # In reports of version 0.1 the only source has no line of its own.
    recorded = [source.revision for source in report.sources] or [report.revision]
    portions = params.calibrate.portions
    return len(portions) == len(recorded) and any(
        revisions.changed(portion.source, revision) for portion, revision in zip(portions, recorded, strict=True)
    )


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
    if settings.n_tokens > model.context:
        raise ValueError(
            f"calibrate.n_tokens = {settings.n_tokens} is more than the model's context of {model.context} tokens"
        )
    tokenizer = model.tokenizer
    portions = settings.portions
    texts = _texts(portions, model, settings)
    tokens = _cut(zip(texts, portions, strict=True), model, settings)
    highest = max(int(windows.max()) for windows in tokens.named().values())
    if highest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer in {paths.MODEL} makes token {highest}, the model has {config.vocab_size}: "
            "it is not the model's, fetch the model with its own"
        )
    sources = [
        CalibrationSource(
            name=name,
            kind=portion.source.kind,
            revision=found.revision,
            share=portion.source.share,
            n_documents=len(found.documents),
            n_characters=sum(map(len, found.documents)),
            n_samples=portion.n_samples,
            n_held_out_samples=portion.n_held_out_samples,
            n_healing_samples=portion.n_healing_samples,
            n_tokens=portion.n_windows * settings.n_tokens,
        )
        for name, found, portion in zip(tokens.sources, texts, portions, strict=True)
    ]
    report = CalibrateReport(
        source=" + ".join(source.name for source in sources),
        revision=" + ".join(source.revision for source in sources),
        sources=sources,
        n_documents=sum(source.n_documents for source in sources),
        n_characters=sum(source.n_characters for source in sources),
        n_samples=settings.n_samples,
        n_tokens=settings.n_tokens,
        n_held_out_samples=settings.n_held_out_samples,
        n_healing_samples=settings.n_healing_samples,
        calibration_sha256=tokens.calibration_sha256,
        held_out_sha256=tokens.held_out_sha256,
        healing_sha256=tokens.healing_sha256,
        tokenizer_sha256=tokenizer_sha256(paths.MODEL),
        bos=bool(window_start(tokenizer)),
    )
    with staged(paths.CALIBRATION) as directory:
        write_tokens(directory, tokens, report.model_dump(include={"source", "revision", "tokenizer_sha256"}))
        # Remove the stale report first, so that a crash cannot leave it beside the new windows.
        paths.report("calibrate").unlink(missing_ok=True)
    report.write(paths.report("calibrate"))
    for source in sources:
        logger.info(
            "calibrate: %d calibration, %d held-out, %d healing windows of %d tokens from %s (%d documents, %.0f kB)%s",
            source.n_samples,
            source.n_held_out_samples,
            source.n_healing_samples,
            report.n_tokens,
            source.name,
            source.n_documents,
            source.n_characters / 1e3,
            ", each with BOS" if report.bos else "",
        )
    return report


def _texts(portions: Sequence[Portion], model: ModelDirectory, settings: Calibrate) -> list[Texts]:
    """The documents of every source. The model writes last, when everything else is known to be in order."""
    for portion in portions:
        if isinstance(portion.source, ModelText):
            beginnings(portion.source, model.tokenizer)
    tokenizer = model.tokenizer
    read = {i: read_texts(p.source, tokenizer) for i, p in enumerate(portions) if not isinstance(p.source, ModelText)}
    if len(read) < len(portions):
        _cut(((texts, portions[i]) for i, texts in read.items()), model, settings)
    return [
        read[i]
        if i in read
        else model_texts(portion.source, model, _text_tokens(portion, settings.n_tokens), settings.n_tokens)
        for i, portion in enumerate(portions)
    ]


def _text_tokens(portion: Portion, n_tokens: int) -> int:
    """How much text the windows of a source take."""
    return portion.n_windows * (sum(passages(portion.source.repeated, n_tokens)) or n_tokens)


def _cut(parts: Iterable[tuple[Texts, Portion]], model: ModelDirectory, settings: Calibrate) -> Tokens:
    cuts = [Cut(t, p.n_samples, p.n_held_out_samples, p.n_healing_samples, p.source.repeated) for t, p in parts]
    return cut_windows(cuts, model.tokenizer, n_tokens=settings.n_tokens, shuffle_seed=settings.shuffle_seed)
