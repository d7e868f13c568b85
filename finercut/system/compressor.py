"""Where llm-compressor is installed, which wants other versions of transformers and compressed-tensors than vLLM."""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

PACKAGES = Path(sys.prefix) / "quantise"
"""What one process takes before this environment's own packages: the step `quantise`."""


def installed() -> str | None:
    """The version of llm-compressor there; None if there is none."""
    found = distributions(name="llmcompressor", path=[str(PACKAGES)]) if PACKAGES.is_dir() else ()
    return next((distribution.version for distribution in found), None)
