"""docs/steps.md adds a step: its edits are made in a copy of the project, and the step runs there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/steps.md").read_text(encoding="utf-8")


def edit(file: Path, hunk: str) -> None:
    """Apply one hunk: its lines but those added must follow each other in the file, once."""
    lines = hunk.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if not line.startswith("+"))
    after = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{file.name} has {text.count(before)} times:\n{before}"
    file.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory, compressed):
    """The project with the page's edits, on a tiny model that is healed."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(compressed, root, dirs_exist_ok=True)
    for folder in ("finercut", "pipelines"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", root)
    settings = yaml.safe_load((root / "params.yaml").read_text())
    shutil.copy(ROOT / "params.yaml", root)
    for name, language, block in re.findall(r"(?:In )?`([\w/.]+)`:\n\n(?=```)|```(\w+)\n(.*?)```", PAGE, re.DOTALL):
        if name:
            file = root / name
        elif language == "python":
            file.write_text(block)
        else:
            edit(file, block)
    added = yaml.safe_load((root / "params.yaml").read_text())["cast"]
    (root / "params.yaml").write_text(yaml.safe_dump(settings | {"cast": added}))
    return root


def run(root: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CLAIMS = """
import torch
from finercut.checkpoint.steps import Proof, step
from finercut.tokens import load_tokens
from pipelines import paths, steps
proof = Proof(load_tokens(paths.CALIBRATION).held_out, 0.001, torch.device("cpu"))
for name, parent, child in steps.chain():
    print(name, step(name).claim(parent, child, proof).holds)
print(paths.FINAL)
"""


def test_the_steps_command_writes_its_checkpoint_and_its_claim_holds(clone):
    run(clone, "-m", "pipelines.cli", "cast")
    assert run(clone, "-c", CLAIMS).split() == [
        "prune",
        "True",
        "heal",
        "True",
        "quantise",
        "True",
        "cast",
        "True",
        "artifacts/cast",
    ]
    before, after = (load_file(clone / f"artifacts/{name}/model.safetensors") for name in ("quantised", "cast"))
    assert {str(t.dtype) for t in before.values()} == {"torch.float32"}
    assert {str(t.dtype) for t in after.values()} == {"torch.float16"}
    origin = json.loads((clone / "artifacts/cast/config.json").read_text())["finercut"]
    assert [step["step"] for step in origin["lineage"]] == ["prune", "cast"]
    report = json.loads((clone / "reports/cast.json").read_text())
    assert report["dtype"] == "float16"


def test_its_stage_comes_after_the_other_steps_and_before_the_proof(clone):
    stages = list(yaml.safe_load((clone / "dvc.yaml").read_text())["stages"])
    assert stages.index("quantise") + 1 == stages.index("cast") == stages.index("prove") - 1
