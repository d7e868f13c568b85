"""Makes a fetched model's config say what its weights are stored as.

transformers loads weights as the config says, and saves them so. A pruned model would have another dtype than the whole
model has, where the two do not agree.
"""

from __future__ import annotations

import logging

from finercut.model.configs import read_object, write_object
from finercut.model.directory import ModelDirectory

logger = logging.getLogger("finercut")

_FLOATS = ("bfloat16", "float16", "float32")


def settle_dtype(model: ModelDirectory) -> None:
    """Write the dtype most of the weights are stored as into config.json, where that says another or none."""
    file, stored = model.path / "config.json", model.dtype
    settings = read_object(file)
    said = settings.get("dtype", settings.get("torch_dtype"))
    if stored not in _FLOATS or said == stored:
        return
    if said is not None:
        logger.warning("the weights are stored in %s, config.json says %s: taken as they are stored", stored, said)
    settings = {key: value for key, value in settings.items() if key != "torch_dtype"}
    write_object(file, settings | {"dtype": stored})
