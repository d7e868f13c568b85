"""Which room may import which: held by ruff, as part of `make test`."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.name for path in (ROOT / "finercut").iterdir() if (path / "__init__.py").is_file())
# From the bottom: each may import those before it that its ruff.toml does not ban.
ORDER = [
    "system",
    "model",
    "sources",
    "selection",
    "healing",
    "checkpoint",
    "evaluation",
    "serving",
    "registry",
    "report",
]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("layers")
    for folder in ("finercut", "pipelines"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def complaints(root: Path) -> list[str]:
    ruff = [Path(sys.executable).with_name("ruff"), "check", "--no-cache", "--select", "TID251"]
    done = subprocess.run([*ruff, "--output-format", "concise", "."], cwd=root, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "TID251" in line]


def test_every_room_has_its_place():
    assert sorted(ORDER) == ROOMS
    assert len([p for p in (ROOT / "finercut").iterdir() if p.suffix == ".py" or p.is_dir()]) <= 14


def test_the_project_keeps_its_rules(copy):
    assert complaints(copy) == []


@pytest.mark.parametrize("room", ORDER)
def test_no_room_imports_one_above_it_or_the_pipeline(copy, room):
    above = [f"finercut.{other}" for other in ORDER[ORDER.index(room) + 1 :]]
    stranger = copy / "finercut" / room / "stranger.py"
    for forbidden in (*above, "pipelines", "finercut.pipelines", "prefect", "dvc"):
        stranger.write_text(f"def use():\n    from {forbidden} import something\n\n    return something\n")
        (found,) = complaints(copy)
        assert found.startswith(f"finercut/{room}/stranger.py:2:"), found
    stranger.unlink()


def test_what_every_room_imports_imports_none(copy):
    stranger = copy / "finercut" / "stranger.py"
    for room in ROOMS:
        stranger.write_text(f"from finercut.{room} import something\n")
        (found,) = complaints(copy)
        assert found.startswith("finercut/stranger.py:1:"), found
    stranger.unlink()


@pytest.mark.parametrize("stage", [s for s in STAGES if (ROOT / f"pipelines/{s}.py").is_file()])
def test_no_module_of_the_pipeline_imports_a_stage(copy, stage):
    stranger = copy / "pipelines" / "stranger.py"
    stranger.write_text(f"from . import {stage}\n")
    (found,) = complaints(copy)
    assert found.startswith("pipelines/stranger.py:1:"), found
    stranger.unlink()


def test_a_change_of_the_rules_makes_no_stage_run_again():
    rules = [f"finercut/{room}/{name}" for room in ROOMS for name in ("ruff.toml", ".ruff_cache")]
    dvc = Path(sys.executable).with_name("dvc")
    ignored = subprocess.run([dvc, "check-ignore", *rules], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ignored.stdout.split() == rules


@pytest.mark.parametrize(
    "statement", ["from .prune import run", "from pipelines.prune import run", "from . import prune"]
)
def test_stages_never_import_each_other(copy, statement):
    stage = copy / "pipelines" / "heal_too.py"
    stage.write_text(f"{statement}\n")
    assert complaints(copy) != []
    stage.unlink()


def test_there_are_no_circles_between_rooms():
    arrows = {room: set() for room in ROOMS}
    for room in ROOMS:
        for file in (ROOT / "finercut" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finercut."):
                    arrows[room].add(node.module.split(".")[1])
    for room in ROOMS:
        assert {other for other in arrows[room] & set(ROOMS) if ORDER.index(other) > ORDER.index(room)} == set()
