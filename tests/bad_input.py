"""What the tests of bad input share: a project to damage, and what a command must do about it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import TEXT
from hypothesis import strategies as st

from finercut.serving import vllm_engine
from finercut.system import yaml_files
from pipelines import calibrate, fetch, params, paths, prune, search, steps
from pipelines.cli import main

ROOT = Path(__file__).parents[1]
VALID = yaml_files.read(ROOT / "params.yaml")


def compress(root: Path, model: Path) -> None:
    """Make `root` a project in which everything up to `quantise` has run."""
    shutil.copytree(model, root / "mine")
    (root / "text.txt").write_text("\n\n".join(TEXT * 6))
    changed = copy.deepcopy(VALID)
    changed["fetch"]["source"] = {"kind": "local", "path": "mine"}
    changed["calibrate"] |= {"source": {"kind": "files", "paths": ["text.txt"]}, "n_samples": 2, "n_tokens": 16}
    changed["calibrate"] |= {"n_held_out_samples": 2, "n_healing_samples": 0, "sources": None, "unseen": None}
    changed["search"] |= {"mode": "exact", "candidates": "both", "per": None, "fill": False, "removals": 4}
    changed["search"] |= {"dtype": "float32", "device": "cpu", "continuation_tokens": 4}
    changed["prune"]["budget"] = {"unit": "sublayers", "amount": 2}
    changed["heal"] = {"method": "none"}
    changed["evaluate"] |= {"tasks": [], "device": "cpu"}
    changed["throughput"]["max_model_len"] = 256
    (root / "params.yaml").write_text(yaml_files.dump(changed))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(vllm_engine, "find_spec", lambda name: None)  # its import takes seconds
        for stage in (fetch, calibrate, search, prune):
            stage.run(params.load())
        for step in ("heal", "quantise"):
            steps.run_and_report(step, params.load())
    shutil.rmtree(root / paths.WORK)


def files(root: Path) -> dict[Path, bytes]:
    """All but what a stage keeps for its own next attempt."""
    found = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
    return {p: (root / p).read_bytes() for p in found if not p.is_relative_to(paths.WORK)}


def refused(*arguments: str) -> str:
    """The one line that the command says about it."""
    before = files(Path.cwd())
    said = CliRunner().invoke(main, arguments)
    if said.exception is not None and not isinstance(said.exception, SystemExit):
        raise said.exception
    assert said.exit_code == 1, said.output
    (line,) = said.stderr.splitlines()
    assert line.startswith(f"finercut {arguments[0]}: "), line
    assert 20 < len(line) < 600, line
    assert not line.startswith(f"finercut {arguments[0]}: unexpected "), line
    assert "pydantic" not in line
    assert files(Path.cwd()) == before
    return line


def set_params(**changes: object) -> None:
    """Dotted paths, with `__` for the dot, in params.yaml."""
    values = yaml_files.read(Path("params.yaml"))
    for name, value in changes.items():
        *sections, field = name.split("__")
        section = values
        for key in sections:
            section = section[key]
        section[field] = value
    Path("params.yaml").write_text(yaml_files.dump(values))


def complaint(action: Callable[..., object], file: Path) -> str:
    """What `action` says is wrong with `file`, without it; nothing if it takes it."""
    try:
        action(file)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        return str(error)
    return f"{file} is good"


def names(file: Path, said: str) -> bool:
    return str(file) in said and len(said.splitlines()) == 1 and len(said) < 1000


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with a piece cut out, overwritten or put in."""
    piece = st.binary(max_size=12) | st.sampled_from([b"NaN", b"null", b"-1", b"1e999", b'"', b"{", b"}", b"[", b"\n"])
    place = st.integers(0, len(content))
    return st.builds(lambda at, n, new: content[:at] + new + content[at + n :], place, st.integers(0, 40), piece)
