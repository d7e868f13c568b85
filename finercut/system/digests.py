"""What the package's own code is known by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import finercut


def code_sha256(names: Iterable[str]) -> str:
    """Over the names and contents of modules.

    Args:
        names: of rooms and modules in the package.
    """
    root = Path(finercut.__file__).parent
    paths = [root / name for name in names]
    digest = hashlib.sha256()
    for file in sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
