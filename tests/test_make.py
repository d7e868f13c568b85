"""`make test` and `make audit` in a project whose ruff and pytest only say that they ran."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = '#!/bin/sh\necho "$(basename "$0") $*"\n'


@pytest.fixture
def project(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for name in ("ruff", "pytest"):
        (tools / name).write_text(TOOL)
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / ".venv/.ready-cpu").touch()  # newer than what set-up depends on
    return tmp_path


def make(project: Path, target: str) -> subprocess.CompletedProcess:
    # The suite may run under make itself, whose variables would make this one announce its directories.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    nowhere = outside | {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    return subprocess.run(["make", target], cwd=project, env=nowhere, capture_output=True, text=True, check=False)


def test_a_lock_that_cannot_be_audited_is_what_make_test_ends_with_and_no_pass_of_make_audit(project):
    done = make(project, "test")
    assert done.returncode == 0
    assert "pytest --durations=20" in done.stdout
    assert done.stdout.partition("pytest --durations")[2].splitlines()[-2].startswith("**** NOT AUDITED: ")
    assert make(project, "audit").returncode != 0


@pytest.mark.parametrize("status", [0, 1])
def test_an_audit_that_was_made_decides(project, status):
    (project / ".venv/.not-audited").write_text("**** NOT AUDITED: of an earlier time\n")
    audit = project / "requirements/audit"
    notice = next(line for line in audit.read_text().splitlines() if line.startswith("rm "))
    audit.write_text(f"#!/bin/sh\nnotice=.venv/.not-audited\n{notice}\nexit {status}\n")
    done = make(project, "test")
    assert (done.returncode == 0) == (status == 0)
    assert ("pytest --durations" in done.stdout) == (status == 0)
    assert "NOT AUDITED" not in done.stdout


def test_the_fast_tests_are_chosen_by_the_marker(project):
    done = make(project, "test-fast")
    assert done.returncode == 0, done.stderr
    assert "ruff check ." in done.stdout
    assert "-m not slow and not matrix" in done.stdout
