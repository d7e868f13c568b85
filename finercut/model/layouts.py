"""Finds the sublayers of an undeclared family, and notes them for the later stages."""

from __future__ import annotations

import json
import logging

from finercut.model.configs import note
from finercut.model.directory import ModelDirectory
from finercut.model.families import LAYOUT_KEY, is_declared
from finercut.model.loading import load_whole

logger = logging.getLogger("finercut")


def note_layout(model: ModelDirectory) -> ModelDirectory:
    """Run a model of an undeclared family to find its sublayers, and write them into its config.json.

    Returns:
        The directory as it is now; `model` itself where the family is declared.

    Raises:
        ValueError: the sublayers are not found.
    """
    if is_declared(model.config):
        return model
    layout = getattr(load_whole(model).config, LAYOUT_KEY)
    logger.info("found the sublayers of this undeclared family: %s", json.dumps(layout))
    note(model.path, LAYOUT_KEY, layout)
    return ModelDirectory(model.path)
