"""Stage `fetch`: a model source in, the whole model in Hugging Face layout out."""

from __future__ import annotations

import logging
import time

from finercut.sources import revisions
from finercut.sources.corrections import settle
from finercut.sources.models import fetch_model
from finercut.sources.records import FetchReport
from finercut.sources.settings import LocalModel
from finercut.system.staging import staged

from . import foresight, paths
from .params import Params

logger = logging.getLogger("finercut")

# Raise it, here and in dvc.yaml, when the stage makes something else of the same source.
FORMAT = 2


def is_stale(params: Params) -> bool:
    """Whether a local model was edited after it was fetched: DVC knows its path alone."""
    path = paths.report("fetch")
    if not path.is_file():
        return False
    try:
        return revisions.changed(params.fetch.source, FetchReport.read(path).revision)
    except ValueError:
        return True  # another version wrote it


def run(params: Params, file_format: int | None = None) -> FetchReport:
    """
    Args:
        file_format: that the caller expects; None takes any.

    Raises:
        FileNotFoundError, ValueError: no such model, or one that is not taken, and why; or settings of later stages
            that do not fit it.
        RuntimeError: no access, no answer, or no pip.
    """
    if file_format not in (None, FORMAT):
        raise ValueError(f"dvc.yaml asks for format {file_format} of fetch, this version writes {FORMAT}: set it there")
    source = params.fetch.source
    if isinstance(source, LocalModel) and source.path.resolve() == paths.MODEL.resolve():
        raise ValueError(f"fetch.source.path is {paths.MODEL}, where the model is copied to: keep it somewhere else")
    started = time.monotonic()
    with staged(paths.MODEL) as directory:
        origin = fetch_model(source, directory, paths.WORK / "fetch")
        model = settle(directory, origin.source)
        foresight.check(params, model)
        config = model.language
        report = FetchReport(
            source=origin.source,
            revision=origin.revision,
            sha256=model.weights_sha256,
            model_type=model.config.model_type,
            n_blocks=config.num_hidden_layers,
            n_parameters=model.n_elements,
            weights_bytes=model.weights_bytes,
            dtype=model.dtype,
            vocab_size=config.vocab_size,
            max_position_embeddings=model.context,
        )
        # Remove the stale report first, so that a crash cannot leave it beside the new model.
        paths.report("fetch").unlink(missing_ok=True)
    report.write(paths.report("fetch"))
    logger.info(
        "fetch: %s, %d blocks, %.1f M parameters, %.0f MiB of %s in %.0f s",
        report.source,
        report.n_blocks,
        report.n_parameters / 1e6,
        report.weights_bytes / 2**20,
        report.dtype,
        time.monotonic() - started,
    )
    return report
