"""Which params.yaml an execution takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from pipelines import settings
from pipelines.params import load

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A committed project of two params files."""
    monkeypatch.chdir(tmp_path)
    Path("params").mkdir()
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    Path("params/paper.yaml").write_text((ROOT / "params/paper-llama3-8b.yaml").read_text())
    subprocess.run(
        "git init -q && git add -A && git -c user.name=t -c user.email=t@t commit -qm clone", shell=True, check=True
    )


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
