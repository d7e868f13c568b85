"""How stable a selection is over two halves of the calibration windows."""

import shutil

import pytest
from stage_project import fresh, settings, with_changes

from finercut.sublayers import parse
from finercut.tokens import Tokens, write_tokens
from pipelines import paths, search, stability


def test_stability_is_the_overlap_of_searches_on_two_halves(project, tokens):
    removed = []
    for half in (tokens[:4:2], tokens[1:4:2]):
        shutil.rmtree(paths.CALIBRATION)
        write_tokens(fresh(paths.CALIBRATION), Tokens(half.contiguous(), tokens[4:]), {})
        removed.append(set(search.run(settings()).removals))
    write_tokens(fresh(paths.CALIBRATION), Tokens(tokens[:4], tokens[4:]), {})
    before = {file: file.read_bytes() for file in (paths.TRAJECTORY, paths.SELECTION, paths.report("search"))}
    shutil.rmtree(paths.WORK)
    said = stability.run(settings())
    shared = len(removed[0] & removed[1]) / len(removed[0] | removed[1])
    assert f"overlap of the removed sublayers {shared:.2f}" in said
    for name in removed[0] ^ removed[1]:
        which = "first" if name in removed[0] else "second"
        assert any(name in line for line in said.splitlines() if f"only the {which} removes" in line)
    assert before == {file: file.read_bytes() for file in before}


def test_the_overlap_by_hand():
    first, second = ({s for n in names for s in parse(n).sublayers} for names in (["0.block"], ["0.mlp", "1.mlp"]))
    assert stability.overlap(first, second) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search__method": "random"}, "random looks at no windows"),
        ({"search__method": "last_blocks", "search__candidates": "blocks"}, "last_blocks looks at no windows"),
        ({"search__divergence": "task", "search__task": "t"}, "search.task decides"),
    ],
)
def test_stability_of_what_does_not_depend_on_the_windows_is_refused(project, changes, message):
    with pytest.raises(ValueError, match=message):
        stability.run(with_changes(**changes))
