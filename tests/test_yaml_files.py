"""YAML 1.2, as DVC reads it, with every error in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_input import ROOT
from dvc.utils.serialize import load_yaml
from hypothesis import example, given
from hypothesis import strategies as st

from finercut.system import yaml_files
from pipelines import params

TEXT = (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize(
    "scalar",
    [
        "1e-4",
        "1e-3",
        "2E5",
        "1.",
        ".5",
        "0123",
        "0o17",
        "0x1F",
        "1_000",
        "yes",
        "no",
        "on",
        "off",
        "true",
        "~",
        "null",
        "1:30",
        "24:00:00",
        "2024-01-01",
        "12e4",
        "'1e-4'",
        "+1",
    ],
)
def test_a_scalar_means_what_it_means_to_dvc(tmp_path, scalar):
    file = tmp_path / "params.yaml"
    file.write_text(f"a: {scalar}\n")
    mine, dvcs = yaml_files.read(file), load_yaml(str(file))
    assert (mine, type(mine["a"])) == (dvcs, type(dvcs["a"]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("logit_tolerance: 0.001", "logit_tolerance: 1e-3"),
        ("log_probability_tolerance: 0.02", "log_probability_tolerance: 2e-2"),
        ("error_probability: 0.05", "error_probability: 5E-2"),
        ("retry_delay_s: 10", "retry_delay_s: 1e1"),
        ("exclude: null", "exclude: ~"),
        ("exclude: null", "exclude:"),
        ("metric: exact_match", "metric: on"),
        ("n_samples: 10", "n_samples: 0o12"),
        ("n_samples: 10", "n_samples: 010"),
        ("# Every", "\ufeff# Every"),
    ],
)
def test_params_take_what_yaml_1_2_takes(old, new):
    assert old in TEXT
    expected = params.parse(TEXT, "params.yaml").model_dump()
    if "metric" in new:
        expected["evaluate"]["tasks"][2]["metric"] = "on"
    assert params.parse(TEXT.replace(old, new, 1), "params.yaml").model_dump() == expected


def test_a_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    before, _, after = TEXT.partition("fetch:\n")
    source = "fetch: {source: {kind: local, path: ~/models/mine}}\n"
    text = before + source + after[after.index("\ncalibrate:") :]
    assert params.parse(text, "params.yaml").fetch.source.path == Path("/home/me/models/mine")
    with pytest.raises(ValueError, match=r"fetch\.source\.path: .*: write ~/, as ~ alone is null \(line 4\)"):
        params.parse(text.replace("~/models/mine", "~"), "params.yaml")
    with pytest.raises(ValueError, match="no home directory of ~nobody-here here"):
        params.parse(text.replace("~/", "~nobody-here/"), "params.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("enforce_eager: true", "enforce_eager: yes", "throughput.enforce_eager: * boolean: write true or false"),
        ("version: 0.1.2", "version: 0.1", "fetch.source.version: * string: put it in quotes"),
        ("version: 0.1.2", "version: 2024-01-01", "fetch.source.version: * string: put it in quotes"),
        ("n_samples: 10", "n_samples: '10'", "calibrate.n_samples: * integer: write it without quotes"),
        ("n_samples: 10", "n_samples: 10e0", "calibrate.n_samples: * integer: write it without point and exponent"),
        ("error_probability: 0.05", "error_probability: 5%", "search.error_probability: *: write a share as 0.25"),
    ],
)
def test_a_value_of_another_type_than_meant_is_an_error_that_says_how_to_write_it(old, new, said):
    line = next(number for number, text in enumerate(TEXT.splitlines(), start=1) if old in text)
    start, end = said.split("*")
    with pytest.raises(ValueError) as raised:
        params.parse(TEXT.replace(old, new, 1), "params.yaml")
    assert str(raised.value).startswith(f"params.yaml: {start}")
    assert str(raised.value).endswith(f"{end} (line {line})")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: secret", "f:3: a is there twice in one section; remove one of the two"),
        ("a:\n  b: {c: 1, c: 2}", "f:2: c is there twice in one section; remove one of the two"),
        ("a: [1\nb: 2", "f:2 is not YAML: "),
        ("a: 1\n\tb: 2", "f:2 is not YAML: found character"),
        ("a: *b", "f:1 is not YAML: found undefined alias"),
        ("a: !!python/name:os.system x", "f:1 is not YAML: could not determine a constructor"),
        ("a: 2026-02-30", "f is not YAML: day is out of range for month"),
        ("[" * 300_000, "f is not YAML: it is nested too deeply"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_yaml_is_one_line_with_its_place(text, said):
    with pytest.raises(ValueError) as raised:
        yaml_files.parse(text, "f")
    assert str(raised.value).startswith(said)
    assert len(str(raised.value).splitlines()) == 1
    assert "secret" not in str(raised.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="ascii"))


@given(
    document=st.dictionaries(
        st.text("abc", min_size=1), SCALARS | st.lists(SCALARS) | st.dictionaries(st.text("de"), SCALARS)
    )
)
@example(document={"a": ["1e-4", "0o17", "yes", "2024-01-01", "~", "", "null", "12e4", "=", "<<", "a: b", "#", "0123"]})
@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_what_is_written_is_read_again(version, document):
    assert yaml_files.parse(yaml_files.dump(document, version), "f", version) == document


@pytest.mark.parametrize("file", [ROOT / "params.yaml", *(ROOT / "params").glob("*.yaml")], ids=lambda file: file.name)
def test_a_file_that_is_edited_keeps_its_comments_and_layout(file):
    text = file.read_text()
    document = yaml_files.editable(text, "f")
    assert yaml_files.dump(document) == text
    document["calibrate"]["shuffle_seed"] = 5
    document["search"]["exclude"] = None
    changed = yaml_files.dump(document).splitlines()
    differing = [new for old, new in zip(text.splitlines(), changed, strict=True) if old != new]
    assert all(line.startswith(("  shuffle_seed: 5", "  exclude: null")) for line in differing)
