"""What `finercut inspect` prints: of a checkpoint, a selection, a trajectory or a registered version."""

from __future__ import annotations

from pathlib import Path

from finercut.sublayers import KINDS


def describe(what: str) -> str:
    """
    Raises:
        FileNotFoundError, ValueError: there is nothing at that path, or it is something else.
        RuntimeError: MLflow has no such version, or does not answer.
    """
    if what.startswith("models:"):
        return _version(what)
    if what.startswith("runs:"):
        raise ValueError(f"{what} is a run: `finercut report {what}` makes its page")
    if Path(what).is_dir():
        return _checkpoint(Path(what))
    return (_selection if what.endswith(".json") else _trajectory)(Path(what))


def _checkpoint(path: Path) -> str:
    from finercut.checkpoint.lineage import lineage_of
    from finercut.model.directory import ModelDirectory
    from finercut.model.families import Layout

    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {path}: it has no config.json")
    model = ModelDirectory(path)
    n_blocks, removed = model.language.num_hidden_layers, model.removed
    if not removed and not model.is_pruned:
        return f"whole {model.config.model_type} model, {n_blocks} blocks, nothing removed"
    origin = model.settings.get("finercut") or {}
    if sorted(map(str, removed)) != sorted(map(str, origin.get("removals", ()))):
        raise ValueError(
            f"{path}/config.json contradicts itself, and nothing loads it as it is: its blocks skip "
            f"{', '.join(map(str, removed)) or 'nothing'}, its section finercut names "
            f"{', '.join(map(str, origin.get('removals', ()))) or 'nothing'}"
        )
    n_sublayers = len(Layout.from_dict(origin["layout"]).sublayers(n_blocks))
    rows = {f"{kind} removed": [s.block for s in removed if s.kind == kind] for kind in KINDS}
    lines = [
        f"{model.config.architectures[0]}, {n_blocks} blocks, {len(removed)} of {n_sublayers} sublayers removed",
        *(f"  {name}: {', '.join(map(str, blocks)) or 'none'}" for name, blocks in rows.items()),
        *(f"  {name}: {value}" for name, value in origin.items() if name not in ("layout", "removals", "lineage")),
        f"  order of removal: {' '.join(origin['removals'])}",
        *(f"  step {s.step}: finercut {s.version}, {s.settings}" for s in lineage_of(model)),
    ]
    return "\n".join(lines)


def _version(uri: str) -> str:
    from finercut.registry import versions

    reference = versions.VersionReference.parse(uri)
    found = versions.find(versions.connect(reference.name), reference)
    lines = {
        "model": f"{reference.name} version {found.version}",
        "aliases": ", ".join(found.aliases) or "none",
        "run": found.run_id or "none",
        **dict(sorted(found.tags.items())),
        "download": f"mlflow artifacts download -u {uri} -d DIRECTORY",
    }
    width = max(map(len, lines))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())


def _selection(path: Path) -> str:
    from finercut.selection.selection import Selection

    found = Selection.read(path)
    origin = [f"{name}: {value}" for name, value in (found.origin.model_dump() if found.origin else {}).items()]
    shown = [
        (n, c.candidate, *("-" if d is None else f"{d:.5f}" for d in (c.divergence, c.held_out_divergence)))
        for n, c in enumerate(found.removals, 1)
    ]
    return _listed([f"method: {found.method}", *origin], shown)


def _trajectory(path: Path) -> str:
    from finercut.selection.trajectory import read_trajectory

    found = read_trajectory(path)
    origin = [f"{name}: {value}" for name, value in found.provenance.model_dump().items()]
    steps = [(r.step, r.sublayer, f"{r.divergence:.5f}", f"{r.held_out_divergence:.5f}") for r in found.removals]
    return _listed(origin, steps)


def _listed(origin: list[str], removals: list[tuple[int, str, str, str]]) -> str:
    rows = [("step", "removed", "divergence", "held-out"), *removals]
    return "\n".join([*origin, *(f"{step:>4}  {name:<14}{one:>12}{other:>12}" for step, name, one, other in rows)])
