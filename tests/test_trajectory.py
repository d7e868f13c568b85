import math

import pytest

from finercut.selection import trajectory
from finercut.selection.trajectory import Provenance, Removal, Trajectory, read_trajectory
from finercut.sublayers import Sublayer


def provenance(**changes) -> Provenance:
    return Provenance(
        **{
            "model_source": "m",
            "model_revision": "r",
            "model_sha256": "0" * 64,
            "n_blocks": 4,
            "calibration_sha256": "1" * 64,
            "held_out_sha256": "2" * 64,
            "divergence": "js",
            "candidates": "both",
            "protect": [],
            "exclude": None,
            "dtype": "float32",
            "device": "cpu",
            "torch_version": "t",
            "transformers_version": "t",
            "mode": "exact",
            "error_probability": None,
            "code_sha256": "3" * 64,
        }
        | changes
    )


def removal(step: int, sublayer: str, **changes) -> Removal:
    return Removal(
        **{
            "step": step,
            "sublayer": sublayer,
            "divergence": 0.1 * step,
            "held_out_divergence": 0.1 * step,
            "values": {sublayer: 0.1 * step},
            "mode": "exact",
            "abandoned": {},
            "stale": {},
            "dropped": {},
            "margin": None,
            "largest_fall": 0.0,
            "error_probability": 0.0,
            "by_window": {sublayer: [0.1 * step]},
            "evaluations": 1,
            "head_tokens": 1,
            "sublayer_passes": 1,
            "brute_force_sublayer_passes": 2,
        }
        | changes
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trajectory.jsonl"


def test_what_is_appended_is_read_back(path):
    trajectory.resume(path, provenance())
    removals = (removal(1, "2.mlp", values={"2.mlp": 0.1, "1.mlp": math.inf}), removal(2, "1.attention"))
    for r in removals:
        trajectory.append(path, r)
    assert read_trajectory(path) == Trajectory(provenance(), removals)
    assert read_trajectory(path).sublayers(1) == [Sublayer(2, "mlp")]


def test_a_torn_last_line_is_dropped_and_the_search_goes_on(path):
    trajectory.resume(path, provenance())
    trajectory.append(path, removal(1, "2.mlp"))
    undisturbed = path.read_text() + removal(2, "1.mlp").to_json()
    with path.open("a") as file:
        file.write(removal(2, "1.mlp").to_json()[:-20])
    assert [r.step for r in trajectory.resume(path, provenance()).removals] == [1]
    trajectory.append(path, removal(2, "1.mlp"))
    assert path.read_text() == undisturbed


def test_a_torn_provenance_starts_anew(path):
    path.write_text(provenance().to_json()[:30])
    assert trajectory.resume(path, provenance()).removals == ()
    assert path.read_text() == provenance().to_json()


def test_other_provenance_is_refused_and_named(path):
    trajectory.resume(path, provenance())
    with pytest.raises(ValueError, match="dtype is 'float32', this one's 'bfloat16'"):
        trajectory.resume(path, provenance(dtype="bfloat16"))
    assert provenance().key != provenance(dtype="bfloat16").key


@pytest.mark.parametrize(
    "lines",
    [
        ["{}"],
        ["not json"],
        [provenance().to_json(), "{}"],
        [provenance().to_json(), removal(2, "1.mlp").to_json()],
        [provenance().to_json(), removal(1, "1.mlp").to_json(), removal(2, "1.mlp").to_json()],
        [provenance().to_json(), removal(1, "1.mlp").to_json(), removal(2, "1.block").to_json()],
        [provenance().to_json(), removal(1, "4.mlp").to_json()],
        [provenance().to_json(), removal(1, "1.mlp").to_json().replace("1.mlp", "x")],
    ],
)
def test_a_line_that_cannot_be_is_named(path, lines):
    path.write_text("".join(line.strip() + "\n" for line in lines))
    with pytest.raises(ValueError, match=f"trajectory.jsonl:{len(lines)}: |is not a sublayer"):
        read_trajectory(path)
