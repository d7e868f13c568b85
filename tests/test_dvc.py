"""dvc.yaml against the code: a stage that reads or runs what it does not declare would not be run again."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import dag, paths
from pipelines.cli import STAGES
from pipelines.params import Params

ROOT = Path(__file__).parents[1]
DECLARED = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# The typed contract between stages, and what computes nothing: dvc.yaml says why they are no dependencies.
CONTRACT = {
    "finercut/__init__.py",
    "pipelines/params.py",
    "pipelines/paths.py",
    "finercut/system/redaction.py",
    "finercut/reports.py",
    "finercut/registry/live.py",
}
# vLLM imports these by name.
BY_NAME = {"throughput": ["finercut/serving/vllm_models.py", "finercut/serving/vllm_plugin.py"]}
ORDER = ["fetch", "calibrate", "search", "prune", "evaluate", "throughput"]

each_stage = pytest.mark.parametrize("stage", ORDER)


def imported(file: Path) -> set[Path]:
    """The project's modules `file` imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {
        Path(*name.split(".")).with_suffix(".py") for name in names if name.split(".")[0] in ("finercut", "pipelines")
    }
    return {found for found in files if (ROOT / found).is_file()}


def code_of(stage: str) -> set[str]:
    """Every module of the project that runs in a stage."""
    found: set[Path] = set()
    waiting = {Path("pipelines", f"{stage}.py"), *map(Path, BY_NAME.get(stage, []))}
    while waiting:
        module = waiting.pop()
        found.add(module)
        waiting |= imported(ROOT / module) - found
    return {module.as_posix() for module in found}


def files_of(stage: str) -> set[str]:
    """The artifacts and reports its module names."""
    tree = ast.parse((ROOT / "pipelines" / f"{stage}.py").read_text(encoding="utf-8"))
    named = {
        str(getattr(paths, node.attr))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "paths" and node.attr.isupper()
    }
    reports = {
        str(paths.report(node.args[0].value))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "paths.report"
    }
    return (named | reports) - {str(paths.WORK), str(paths.REPORTS)}


@each_stage
def test_a_stage_depends_on_the_code_it_runs(stage):
    declared = {dep for dep in DECLARED[stage]["deps"] if dep.endswith(".py")}
    assert declared == code_of(stage) - CONTRACT


@each_stage
def test_a_stage_declares_the_files_it_names(stage):
    declared = DECLARED[stage]
    files = {*declared["deps"], *declared.get("outs", []), *declared["metrics"]}
    assert files_of(stage) - files == set()


@each_stage
def test_a_stage_has_a_command_a_section_of_params_and_a_report(stage):
    assert DECLARED[stage]["cmd"] == f"python -m pipelines.cli {stage}"
    assert stage in STAGES
    assert DECLARED[stage]["params"] == [stage]
    assert stage in Params.model_fields
    assert f"reports/{stage}.json" in DECLARED[stage]["metrics"]


def test_stages_run_in_the_order_of_what_they_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [stage.name for stage in dag.stages()] == ORDER


def test_a_search_answers_every_budget_it_reaches():
    # prune's budget must not be among what a search depends on
    assert "prune" not in DECLARED["search"]["params"]
    assert set(DECLARED["prune"]["deps"]) >= {"artifacts/trajectory.jsonl", "artifacts/model"}


def test_nothing_is_timed_before_parity_is_known():
    assert "reports/parity.json" in DECLARED["throughput"]["deps"]
    assert "reports/parity.json" in DECLARED["evaluate"]["metrics"]


def test_the_search_in_progress_is_neither_dependency_nor_output():
    listed = [path for stage in DECLARED.values() for key in ("deps", "outs", "metrics") for path in stage.get(key, [])]
    assert not any(path.startswith(str(paths.WORK)) for path in listed)


def test_mlflows_copies_of_dvc_yaml_are_no_stages(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
    for folder in (tmp_path, tmp_path / "copies"):
        folder.mkdir(exist_ok=True)
        (folder / "dvc.yaml").write_text("stages: {fetch: {cmd: 'true', outs: [a]}}")
    monkeypatch.chdir(tmp_path)
    assert [stage.name for stage in dag.stages()] == ["fetch"]
