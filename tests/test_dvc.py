"""dvc.yaml against the code: a stage that reads or runs what it does not declare would not be run again."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import dag, environment, fetch, paths, reports
from pipelines.cli_stages import STAGES
from pipelines.params import Params

ROOT = Path(__file__).parents[1]
DECLARED = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# What decides no result: atomic writing and logging, the types of reports and of params, the figures sent meanwhile.
DECIDES_NOTHING = re.compile(
    r"finercut/(__init__.py|system/.*|registry/live.py|\w+/(records|settings).py)|pipelines/(params|paths).py"
)
# Named by strings: what vLLM imports, and the steps on checkpoints.
BY_NAME = {
    "heal": [
        "finercut/checkpoint/heal.py",
        "finercut/healing/distill.py",
        "finercut/healing/reconstruct.py",
        "finercut/healing/refit.py",
    ],
    "prune": ["finercut/checkpoint/prune.py"],
    "quantise": ["finercut/checkpoint/quantise.py", "finercut/checkpoint/quantise_process.py"],
    "prove_whole": ["finercut/serving/vllm_models.py"],
    "prove": [
        "finercut/checkpoint/prune.py",
        "finercut/checkpoint/heal.py",
        "finercut/checkpoint/quantise.py",
        "finercut/serving/vllm_models.py",
    ],
    "costs": [
        "finercut/serving/vllm_models.py",
        "finercut/serving/vllm_plugin.py",
        "finercut/serving/vllm_process.py",
    ],
    "throughput": [
        "finercut/serving/vllm_models.py",
        "finercut/serving/vllm_plugin.py",
        "finercut/serving/vllm_process.py",
    ],
}
ORDER = [
    "fetch",
    "calibrate",
    "prove_whole",
    "evaluate_whole",
    "costs",
    "search",
    "prune",
    "heal",
    "quantise",
    "prove",
    "evaluate",
    "throughput",
]
# Their sections of params.yaml bear other names.
SECTIONS = {"evaluate_whole": "evaluate", "prove_whole": "prove", "costs": "throughput"}
MODULES = {"heal": "steps", "quantise": "steps"}

each_stage = pytest.mark.parametrize("stage", ORDER)


def imported(file: Path) -> set[Path]:
    """The project's modules `file` imports when it runs; what only a type checker imports is left out."""
    names = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"pipelines.{node.module}" if node.level and node.module else node.module or "pipelines"
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    files = {
        Path(*name.split(".")).with_suffix(".py") for name in names if name.split(".")[0] in ("finercut", "pipelines")
    }
    return {found for found in files if (ROOT / found).is_file()}


def code_of(stage: str) -> set[str]:
    """Every module of the project that decides what a stage makes."""
    found: set[Path] = set()
    waiting = {Path("pipelines", f"{MODULES.get(stage, stage)}.py"), *map(Path, BY_NAME.get(stage, []))}
    while waiting:
        module = waiting.pop()
        found.add(module)
        if not DECIDES_NOTHING.fullmatch(module.as_posix()):
            waiting |= imported(ROOT / module) - found
    return {name for module in found if not DECIDES_NOTHING.fullmatch(name := module.as_posix())}


def files_of(stage: str) -> set[str]:
    """The artifacts and reports its module names."""
    tree = ast.parse((ROOT / "pipelines" / f"{MODULES.get(stage, stage)}.py").read_text(encoding="utf-8"))
    named = {
        str(getattr(paths, node.attr))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) == "paths"
        and node.attr.isupper()
        and node.attr != "CHAIN"
    }
    reports = {
        str(paths.report(node.args[0].value))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "paths.report"
        and isinstance(node.args[0], ast.Constant)
    }
    # Of the shared module for steps, what the step at hand reads.
    steps = ("heal", "quantise")
    unused = {str(paths.CALIBRATION), str(paths.SELECTION), str(paths.MODEL)} if stage in steps else set()
    return (named | reports) - {str(paths.WORK), str(paths.REPORTS)} - unused


@each_stage
def test_the_code_of_a_stage_lies_in_the_rooms_it_depends_on(stage):
    if stage == "fetch":
        return
    code = [dep for dep in DECLARED[stage]["deps"] if dep.startswith(("finercut", "pipelines"))]
    assert all((ROOT / dep).exists() for dep in code)
    inside = {name for name in code_of(stage) for dep in code if name == dep or name.startswith(f"{dep}/")}
    assert code_of(stage) - inside == set()
    unused = {dep for dep in code if not any(name == dep or name.startswith(f"{dep}/") for name in inside)}
    assert unused == set()


def test_fetch_depends_on_no_code():
    assert "deps" not in DECLARED["fetch"]
    assert DECLARED["fetch"]["cmd"].endswith(f"--format {fetch.FORMAT}")


@each_stage
def test_a_stage_declares_the_files_it_names(stage):
    declared = DECLARED[stage]
    files = {*declared.get("deps", []), *declared.get("outs", []), *declared["metrics"]}
    assert files_of(stage) - files == set()


@each_stage
def test_a_stage_has_a_command_a_section_of_params_and_a_report(stage):
    assert DECLARED[stage]["cmd"].startswith(f"python -m pipelines.cli {stage}")
    assert stage in STAGES
    section = SECTIONS.get(stage, stage)
    assert section in DECLARED[stage]["params"]
    assert section in Params.model_fields
    assert f"reports/{stage}.json" in DECLARED[stage]["metrics"]
    assert stage in reports.KINDS


def test_every_step_of_the_chain_is_a_stage_that_writes_its_checkpoint():
    for name, directory in paths.CHAIN.items():
        assert str(directory) in DECLARED[name]["outs"]
        assert str(directory) in DECLARED["prove"]["deps"]
    assert str(paths.FINAL) in DECLARED["evaluate"]["deps"]
    assert str(paths.FINAL) in DECLARED["throughput"]["deps"]


def test_stages_run_in_the_order_of_what_they_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [stage.name for stage in dag.stages()] == ["environment", *ORDER, "report"]


def test_the_page_is_made_every_time_and_after_all_that_it_shows():
    assert DECLARED["report"]["always_changed"]
    assert {f"reports/{stage}.json" for stage in ORDER} <= {*DECLARED["report"]["deps"]}


def test_nothing_is_timed_before_the_claims_are_known_to_hold():
    assert "reports/prove.json" in DECLARED["throughput"]["deps"]
    assert "reports/prove.json" in DECLARED["prove"]["metrics"]


@pytest.mark.parametrize("stage", ["prove_whole", "evaluate_whole"])
def test_a_second_budget_does_not_look_at_the_whole_model_again(stage):
    deps = DECLARED[stage]["deps"]
    assert not any(
        dep.startswith(("artifacts/pruned", "artifacts/healed", "artifacts/quant", "artifacts/sel")) for dep in deps
    )


def test_the_search_in_progress_is_neither_dependency_nor_output():
    listed = [
        str(path) for stage in DECLARED.values() for key in ("deps", "outs", "metrics") for path in stage.get(key, [])
    ]
    assert not any(path.startswith(str(paths.WORK)) for path in listed)


def test_mlflows_copies_of_dvc_yaml_are_no_stages(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
    for folder in (tmp_path, tmp_path / "copies"):
        folder.mkdir(exist_ok=True)
        frozen = folder != tmp_path
        text = {"stages": {"fetch": {"cmd": "touch a", "outs": ["a"], "frozen": frozen}}}
        (folder / "dvc.yaml").write_text(json.dumps(text))
    monkeypatch.chdir(tmp_path)
    assert [stage.name for stage in dag.stages()] == ["fetch"]
    assert dag.stale() == ["fetch"]
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "fetch"], check=True)
    assert dag.stale() == []  # a downloaded version has its own dvc.yaml and dvc.lock


def stand_ins(declared: dict) -> None:
    """A file for everything that the stages write, so that DVC has something to compare."""
    for stage in declared.values():
        for out in (*stage.get("outs", []), *stage.get("metrics", [])):
            path = Path(next(iter(out)) if isinstance(out, dict) else out)
            path.parent.mkdir(exist_ok=True)
            if path.suffix:
                path.write_text("{}")
            else:
                path.mkdir()
                (path / "file").write_text(path.name)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A clone whose dvc.lock records stand-ins of all results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("committed"))
        _commit_stand_ins()
        return Path.cwd()


@pytest.fixture
def reproduced(committed, tmp_path, monkeypatch):
    """A copy of it, and the current directory."""
    monkeypatch.chdir(shutil.copytree(committed, tmp_path / "clone"))


def _commit_stand_ins() -> None:
    for folder in ("finercut", "pipelines", ".dvc"):
        ignored = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
        shutil.copytree(ROOT / folder, folder, ignore=ignored)
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, name)
    stand_ins(DECLARED)
    environment.run(None)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "commit", "--quiet", "--force"], check=True)
    assert dag.stale() == []


def change_environment(**changes):
    versions = json.loads(paths.ENVIRONMENT.read_text())
    assert changes.keys() <= versions.keys()
    paths.ENVIRONMENT.write_text(json.dumps(versions | changes))


@pytest.mark.parametrize(
    ("key", "stale"),
    [
        ("vllm", ["costs", "prove", "prove_whole", "throughput"]),
        ("llmcompressor", ["quantise"]),
        ("lm_eval", ["evaluate", "evaluate_whole"]),
        ("tokenizers", ["calibrate"]),
        ("hardware", ["costs", "prove", "prove_whole", "throughput"]),
        (
            "torch",
            [
                "calibrate",
                "costs",
                "evaluate",
                "evaluate_whole",
                "heal",
                "prove",
                "prove_whole",
                "quantise",
                "search",
                "throughput",
            ],
        ),
        (
            "transformers",
            [
                "calibrate",
                "evaluate",
                "evaluate_whole",
                "heal",
                "prove",
                "prove_whole",
                "prune",
                "quantise",
                "search",
            ],
        ),
    ],
)
def test_another_version_makes_those_stages_stale_that_it_decides(reproduced, key, stale):
    change_environment(**{key: "another"})
    assert dag.stale() == stale


def test_a_comment_in_every_module_does_not_make_fetch_stale(reproduced):
    for module in Path("finercut").rglob("*.py"):
        module.write_text(module.read_text() + "# a comment\n")
    assert "fetch" not in dag.stale()


@pytest.mark.parametrize(
    ("room", "stale"),
    [
        ("finercut/serving/vllm_engine.py", ["costs", "prove", "prove_whole", "throughput"]),
        ("finercut/evaluation/harness.py", ["evaluate", "evaluate_whole"]),
        ("finercut/sources/texts.py", ["calibrate"]),
        ("finercut/registry/gate.py", []),
        ("finercut/system/staging.py", []),
        ("pipelines/flow.py", []),
    ],
)
def test_a_change_of_code_concerns_the_stages_of_its_room(reproduced, room, stale):
    Path(room).write_text(Path(room).read_text() + "# a comment\n")
    assert dag.stale() == stale


def test_compiled_files_make_nothing_stale(reproduced):
    (Path("finercut/model/__pycache__")).mkdir()
    Path("finercut/model/__pycache__/x.cpython-311.pyc").write_bytes(b"compiled")
    assert dag.stale() == []


def test_a_frozen_stage_is_refused_as_dvc_passes_over_what_it_depends_on(reproduced):
    subprocess.run([sys.executable, "-m", "dvc", "freeze", "-q", "prune"], check=True)
    with pytest.raises(RuntimeError, match=r"^stage prune is frozen, .*: `dvc unfreeze prune`$"):
        dag.stages()
    subprocess.run([sys.executable, "-m", "dvc", "unfreeze", "-q", "prune"], check=True)
    assert "prune" in [stage.name for stage in dag.stages()]


def test_what_a_merge_left_in_dvc_lock_is_named(reproduced):
    lock = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(f"<<<<<<< HEAD\n{lock}=======\n{lock}>>>>>>> other\n")
    with pytest.raises(RuntimeError, match=r"^dvc.lock has the marks of a merge"):
        dag.stale()
