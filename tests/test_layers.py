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
    """`FILE:LINE` of each forbidden import."""
    ruff = [Path(sys.executable).with_name("ruff"), "check", "--no-cache", "--select", "TID251"]
    done = subprocess.run([*ruff, "--output-format", "concise", "."], cwd=root, capture_output=True, text=True)
    return sorted(":".join(line.split(":")[:2]) for line in done.stdout.splitlines() if "TID251" in line)


@pytest.fixture
def stranger(copy):
    """Writes a module of statements, each on a line; where each should be complained of."""
    written = []

    def write(file: str, statements: list[str]) -> list[str]:
        (copy / file).write_text("def use():\n" + "".join(f"    {statement}\n" for statement in statements))
        written.append(copy / file)
        return [f"{file}:{line}" for line in range(2, 2 + len(statements))]

    yield write
    for file in written:
        file.unlink()


def test_every_room_has_its_place():
    assert sorted(ORDER) == ROOMS
    assert len([p for p in (ROOT / "finercut").iterdir() if p.suffix == ".py" or p.is_dir()]) <= 14


def test_the_project_keeps_its_rules(copy):
    assert complaints(copy) == []


def test_no_room_imports_one_above_it_or_the_pipeline(copy, stranger):
    expected = []
    for room in ORDER:
        above = [f"finercut.{other}" for other in ORDER[ORDER.index(room) + 1 :]]
        forbidden = (*above, "pipelines", "finercut.pipelines", "prefect", "dvc")
        expected += stranger(f"finercut/{room}/stranger.py", [f"from {name} import something" for name in forbidden])
    assert complaints(copy) == sorted(expected)


def test_what_every_room_imports_imports_none(copy, stranger):
    expected = stranger("finercut/stranger.py", [f"from finercut.{room} import something" for room in ROOMS])
    assert complaints(copy) == sorted(expected)


def test_no_module_of_the_pipeline_imports_a_stage(copy, stranger):
    stages = [stage for stage in STAGES if (ROOT / f"pipelines/{stage}.py").is_file()]
    assert len(stages) >= 8
    ways = ("from .{} import run", "from pipelines.{} import run", "from . import {}")
    expected = stranger("pipelines/stranger.py", [way.format(stage) for stage in stages for way in ways])
    assert complaints(copy) == sorted(expected)


def test_a_change_of_the_rules_makes_no_stage_run_again():
    rules = [f"finercut/{room}/{name}" for room in ROOMS for name in ("ruff.toml", ".ruff_cache")]
    dvc = Path(sys.executable).with_name("dvc")
    ignored = subprocess.run([dvc, "check-ignore", *rules], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ignored.stdout.split() == rules


def test_there_are_no_circles_between_rooms():
    arrows = {room: set() for room in ROOMS}
    for room in ROOMS:
        for file in (ROOT / "finercut" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finercut."):
                    arrows[room].add(node.module.split(".")[1])
    for room in ROOMS:
        assert {other for other in arrows[room] & set(ROOMS) if ORDER.index(other) > ORDER.index(room)} == set()
