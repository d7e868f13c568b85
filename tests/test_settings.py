"""Which params.yaml an execution takes, and how its MLflow run says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import dag, settings
from pipelines.params import load

ROOT = Path(__file__).parents[1]
COMMIT = "git -c user.name=t -c user.email=t@t commit -qm clone"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A committed project of two params files."""
    monkeypatch.chdir(tmp_path)
    Path("params").mkdir()
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    Path("params/paper.yaml").write_text((ROOT / "params/paper-llama3-8b.yaml").read_text())
    subprocess.run(f"git init -q && {sys.executable} -m dvc init -q && git add -A && {COMMIT}", shell=True, check=True)


@pytest.mark.usefixtures("clone")
def test_the_commit_counts_and_not_what_an_earlier_run_left():
    before = load()
    settings.take_committed("params.yaml", {"prune.budget.amount": 0.125, "calibrate.shuffle_seed": None})
    assert load().prune.budget.amount == 0.125
    assert load().calibrate.shuffle_seed is None
    assert load().search == before.search
    settings.take_committed("params.yaml", {})
    assert load() == before
    assert Path("params.yaml").read_text() == (ROOT / "params.yaml").read_text()


@pytest.mark.usefixtures("clone")
def test_another_file_is_taken_as_it_is_and_the_one_before_is_kept():
    before = Path("params.yaml").read_text()
    settings.take_committed("params/paper.yaml", {})
    assert Path("params.yaml").read_text() == Path("params/paper.yaml").read_text()
    assert settings.PREVIOUS.read_text() == before


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize(
    ("file", "overrides", "message"),
    [
        (
            "params/none.yaml",
            {},
            r"no params file params/none\.yaml in the last commit; there are params\.yaml, params/new",
        ),
        ("../params.yaml", {}, "no params file"),
        ("params/new.yaml", {}, "no params file"),
        ("params.yaml", {"prune.budgets.amount": 1}, r"overrides: no field prune\.budgets\.amount; names look like"),
        ("params.yaml", {"prune.typo": 1}, r"params\.yaml and overrides: prune\.typo: Extra inputs"),
        ("params.yaml", {"search.removals": -1}, r"params\.yaml and overrides: search\.removals"),
    ],
)
def test_what_does_not_exist_or_is_not_allowed_changes_nothing(file, overrides, message):
    Path("params/new.yaml").write_text(yaml.safe_dump({}))  # offered, but not committed
    before = Path("params.yaml").read_text()
    with pytest.raises(ValueError, match=message):
        settings.take_committed(file, overrides)
    assert Path("params.yaml").read_text() == before
    assert not settings.PREVIOUS.exists()


@pytest.mark.usefixtures("clone")
def test_overrides_keep_the_files_comments_and_are_named_in_its_first_line():
    settings.take_committed("params.yaml", {"prune.budget.amount": 0.125, "fetch.source.version": "1e-4"})
    first, *lines = Path("params.yaml").read_text().splitlines()
    assert first == (
        '# params.yaml as committed, with overrides {"prune.budget.amount": 0.125, "fetch.source.version": "1e-4"}'
    )
    before = (ROOT / "params.yaml").read_text().splitlines()
    assert [new for old, new in zip(before, lines, strict=True) if old != new] == [
        "    version: '1e-4'",
        "  budget: {unit: parameters, amount: 0.125}",
    ]


def tags():
    found = dag.revision()
    del found["mlflow.source.git.commit"]
    return found


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("file", ["params.yaml", "params/paper.yaml"])
@pytest.mark.parametrize("overrides", [{}, {"prune.budget.amount": 0.5, "calibrate.shuffle_seed": None}])
def test_params_of_a_commit_are_not_dirty_but_named_with_their_overrides(file, overrides):
    settings.take_committed(file, overrides)
    expected = {"git.dirty": "false", "params.file": file}
    if overrides:
        expected["params.overrides"] = '{"prune.budget.amount": 0.5, "calibrate.shuffle_seed": null}'
    assert tags() == expected

    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("n_samples", "n_samples ", 1))
    assert tags() == {"git.dirty": "true"}, "edited since"
    Path("params.yaml").write_text(text)
    Path("dvc.lock").touch()
    assert tags() == expected
    Path("code.py").touch()
    assert tags() == expected | {"git.dirty": "true"}


@pytest.mark.usefixtures("clone")
def test_a_changed_commit_and_a_false_first_line_are_dirty():
    settings.take_committed("params/paper.yaml", {"evaluate.seed": 7})
    subprocess.run(f"echo '# more' >> params/paper.yaml && git add params && {COMMIT}", shell=True, check=True)
    assert tags() == {"git.dirty": "true"}
    for stated in ("params/none.yaml", "params.yaml"):
        Path("params.yaml").write_text(f'# {stated} as committed, with overrides {{"evaluate.seed": }}\nfetch: {{}}\n')
        assert tags() == {"git.dirty": "true"}


@pytest.mark.usefixtures("clone")
def test_a_file_of_the_working_tree_alone_is_dirty():
    text = Path("params.yaml").read_text().replace("seed: 1234", "seed: 1")
    Path("params/mine.yaml").write_text(text)
    settings.replace(text)
    assert tags() == {"git.dirty": "true"}


def test_a_project_in_a_folder_of_a_repository_is_not_dirty_for_its_dvc_lock(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    start = f"git init -q .. && {sys.executable} -m dvc init -q --subdir && git add -A && {COMMIT}"
    subprocess.run(start, shell=True, check=True)
    Path("dvc.lock").touch()
    settings.take_committed("params.yaml", {"evaluate.seed": 7})
    assert tags()["git.dirty"] == "false"
