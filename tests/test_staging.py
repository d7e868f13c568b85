"""What is under a name is the old one or the new one, never half of it."""

from __future__ import annotations

import pytest

from finercut.system.staging import staged, staged_file


def test_the_new_directory_takes_the_place_of_the_old(tmp_path):
    target = tmp_path / "artifacts" / "model"
    for content in ("first", "second"):
        with staged(target) as directory:
            (directory / content).write_text(content)
            assert [file.name for file in target.glob("*")] == ([] if content == "first" else ["first"])
    assert [file.name for file in target.iterdir()] == ["second"]
    assert list(target.parent.iterdir()) == [target]


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


def test_everyone_may_read_what_only_its_writer_could(tmp_path):
    with staged(tmp_path / "model") as directory:
        (directory / "model.safetensors").touch(mode=0o600)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644


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
