"""Atomic writes, and the workspace lock."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from holder import ROOT, holding

from finercut.system import staging
from finercut.system.staging import exclusive, staged, staged_file
from pipelines import paths
from pipelines.cli import main


def test_the_new_directory_takes_the_place_of_the_old(tmp_path):
    target = tmp_path / "artifacts" / "model"
    for content in ("first", "second"):
        with staged(target) as directory:
            (directory / content).write_text(content)
            assert [file.name for file in target.glob("*")] == ([] if content == "first" else ["first"])
    assert [file.name for file in target.iterdir()] == ["second"]
    assert list(target.parent.iterdir()) == [target]


def test_what_a_link_to_another_disk_leads_to_is_replaced(tmp_path):
    elsewhere, target = tmp_path / "disk" / "model", tmp_path / "model"
    elsewhere.mkdir(parents=True)
    target.symlink_to(elsewhere)
    for content in ("first", "second"):
        with staged(target) as directory:
            assert directory.parent == elsewhere.parent  # no rename goes from one disk to another
            (directory / content).touch()
        assert target.is_symlink()
        assert [file.name for file in elsewhere.iterdir()] == [content]


def test_a_failure_leaves_the_old_directory_as_it_was(tmp_path):
    target = tmp_path / "model"
    with staged(target) as directory:
        (directory / "old").touch()
    with pytest.raises(RuntimeError), staged(target) as directory:
        (directory / "new").touch()
        raise RuntimeError
    assert [file.name for file in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_not_taken_over(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "stale").touch()
    with staged(tmp_path / "model") as directory:
        assert list(directory.iterdir()) == []


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize(
    ("umask", "file", "script", "folder"),
    [(0o022, 0o644, 0o744, 0o755), (0o027, 0o640, 0o740, 0o750), (0o077, 0o600, 0o700, 0o700)],
    indirect=["umask"],
)
def test_whom_the_umask_admits_may_read_every_file_and_enter_every_folder(tmp_path, umask, file, script, folder):
    outside = tmp_path / "outside"
    outside.touch()
    outside.chmod(0o600)
    with staged(tmp_path / "model") as directory:
        (directory / "model.safetensors").touch(mode=0o600)
        (directory / "custom_generate").mkdir(mode=0o700)
        (directory / "custom_generate" / "run.sh").touch(mode=0o700)
        (directory / "link").symlink_to(outside)

    def mode(name):
        return (tmp_path / "model" / name).stat().st_mode & 0o777

    assert mode("model.safetensors") == file
    assert mode("custom_generate") == folder
    assert mode("custom_generate/run.sh") == script
    assert outside.stat().st_mode & 0o777 == 0o600


def test_read_only_files_of_the_old_directory_are_replaced_not_written(tmp_path):
    (tmp_path / "model").mkdir()
    cached = tmp_path / "cached"
    cached.write_text("old")
    (tmp_path / "model" / "config.json").hardlink_to(cached)
    with staged(tmp_path / "model") as directory:
        (directory / "config.json").write_text("new")
    assert cached.read_text() == "old"
    assert (tmp_path / "model" / "config.json").read_text() == "new"


@pytest.mark.parametrize("existing", [None, "old"])
def test_a_file_is_replaced_at_the_end_or_left_alone(tmp_path, existing):
    target = tmp_path / "deep" / "file"
    if existing:
        target.parent.mkdir()
        target.write_text(existing)
    with pytest.raises(RuntimeError), staged_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (target.read_text() if target.exists() else None) == existing
    with staged_file(target) as partial:
        partial.write_text("whole")
    assert [p.name for p in target.parent.iterdir()] == ["file"]
    assert target.read_text() == "whole"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A project's root, and the current directory."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.mark.parametrize("command", [["prune"], ["register"], ["run"], ["run", "--params", "other.yaml"]])
def test_while_another_process_works_here_every_command_that_writes_names_it_and_writes_nothing(here, command):
    Path("other.yaml").write_text(Path("params.yaml").read_text().replace("n_samples: 10", "n_samples: 9"))
    before = Path("params.yaml").read_text()
    with holding() as other:
        said = CliRunner().invoke(main, command)
    assert said.exit_code == 1
    assert said.stderr == (
        f"finercut {command[0]}: process {other.pid} works in {here}: wait until it has ended, or end it\n"
    )
    assert Path("params.yaml").read_text() == before


def test_a_killed_holder_lets_go(here):
    with holding() as other:
        other.kill()
        other.wait()
        with exclusive(paths.WORK):
            assert (paths.WORK / "lock").read_text() == str(os.getpid())


# The stage that imports least.
COMMAND = [sys.executable, "-m", "pipelines.cli", "environment"]


def is_let_in(**environment):
    """Whether a stage that is started here with this environment does its work."""
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0 or "works in" in done.stderr, done.stderr
    return done.returncode == 0


def test_what_the_holder_starts_works_under_its_hold_and_nothing_else_does(here):
    with exclusive(paths.WORK):
        held_by = os.environ[staging.HELD_BY]
        assert is_let_in()
        assert is_let_in(TORCHELASTIC_RUN_ID="1", RANK="0")
        assert not is_let_in(**{staging.HELD_BY: ""})
        with exclusive(paths.WORK):  # as the flow collects
            pass
        assert not is_let_in(**{staging.HELD_BY: ""})
    assert staging.HELD_BY not in os.environ
    with holding():
        assert not is_let_in(**{staging.HELD_BY: held_by})


def test_the_first_process_of_a_torchrun_search_holds_the_workspace_for_all(here):
    with holding():
        assert not is_let_in(TORCHELASTIC_RUN_ID="1", RANK="0")
        assert is_let_in(TORCHELASTIC_RUN_ID="1", RANK="1")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(here, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    said = CliRunner().invoke(main, ["prune"])
    assert said.exit_code == 1
    (line,) = said.stderr.splitlines()
    assert line.startswith(f"finercut prune: the file system of {here / paths.WORK} has no file locks (")
    assert "such as a local disk" in line


def test_a_full_disk_does_not_keep_anybody_from_the_lock(here, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging.os, "write", full)
    with exclusive(paths.WORK), pytest.raises(RuntimeError, match=r"^process unknown works in "):
        os.environ[staging.HELD_BY] = ""
        with exclusive(paths.WORK):
            pass
