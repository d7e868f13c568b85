"""Stage `fetch`: a model source in, the whole model in Hugging Face layout out."""

from __future__ import annotations

import logging
import time
from collections import Counter

from finercut.model.checks import check_model
from finercut.model.tensors import safetensors_shapes, weights_bytes, weights_sha256
from finercut.sources.models import fetch_model
from finercut.sources.records import FetchReport
from finercut.sources.settings import LocalModel
from finercut.system.staging import staged
from pipelines import paths
from pipelines.params import Params

logger = logging.getLogger("finercut")

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def run(params: Params) -> FetchReport:
    """
    Raises:
        FileNotFoundError, ValueError: no such model, or one that is not taken, and why.
        RuntimeError: no access, no answer, or no pip.
    """
    source = params.fetch.source
    if isinstance(source, LocalModel) and source.path.resolve() == paths.MODEL.resolve():
        raise ValueError(f"fetch.source.path is {paths.MODEL}, where the model is copied to: keep it somewhere else")
    started = time.monotonic()
    with staged(paths.MODEL) as directory:
        origin = fetch_model(source, directory, paths.WORK / "fetch")
        config = check_model(directory)
        stored = safetensors_shapes(directory)
        n_bytes_by_dtype = Counter[str]()
        for tensor in stored.values():
            n_bytes_by_dtype[tensor.dtype] += tensor.nbytes
        dtype = n_bytes_by_dtype.most_common(1)[0][0]
        report = FetchReport(
            source=origin.source,
            revision=origin.revision,
            sha256=weights_sha256(directory),
            model_type=config.model_type,
            n_blocks=config.num_hidden_layers,
            n_parameters=sum(tensor.n_elements for tensor in stored.values()),
            weights_bytes=weights_bytes(directory),
            dtype=_DTYPES.get(dtype, dtype),
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
        )
        # One of an earlier model must not vouch for this one, should the process end before the last line.
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
