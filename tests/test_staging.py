import pytest

from finercut.staging import staged, staged_file


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


def test_a_directory_is_replaced_at_the_end_or_left_alone(tmp_path):
    target = tmp_path / "directory"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), staged(target) as partial:
        (partial / "half").touch()
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["old"]
    with staged(target) as partial:
        (partial / "new").touch()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]


def test_what_a_kill_left_is_cleared_away(tmp_path):
    (tmp_path / ".directory.partial").mkdir()
    (tmp_path / ".directory.partial" / "half").touch()
    with staged(tmp_path / "directory") as partial:
        assert list(partial.iterdir()) == []
