"""What `finercut inspect` tells of a checkpoint, a trajectory or a registered version."""

from __future__ import annotations

from pathlib import Path


def describe(what: str) -> str:
    """
    Raises:
        FileNotFoundError, ValueError: there is nothing at that path, or it is something else.
        RuntimeError: MLflow has no such version, or does not answer.
    """
    if what.startswith("models:"):
        from finercut.registry import versions

        return versions.describe(what)
    if Path(what).is_dir():
        from finercut.model import loading

        return loading.describe(Path(what))
    return _trajectory(Path(what))


def _trajectory(path: Path) -> str:
    from finercut.selection.trajectory import read_trajectory

    found = read_trajectory(path)
    origin = [f"{name}: {value}" for name, value in found.provenance.model_dump().items()]
    header = f"{'step':>4}  {'removed':<14}{'divergence':>12}{'held-out':>12}"
    steps = [
        f"{r.step:>4}  {r.sublayer:<14}{r.divergence:>12.5f}{r.held_out_divergence:>12.5f}" for r in found.removals
    ]
    return "\n".join([*origin, header, *steps])
