"""Headers of safetensors files, against what torch says of the same tensors."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finercut.model.tensors import (
    INDEX,
    StoredTensor,
    copy_tensors,
    safetensors_shapes,
    weights_bytes,
    weights_sha256,
)


@pytest.fixture
def directory(tmp_path):
    save_file({"b": torch.zeros(3, 5, dtype=torch.bfloat16), "s": torch.tensor(1.0)}, tmp_path / "x-2.safetensors")
    save_file({"a": torch.zeros(7)}, tmp_path / "x-1.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_shapes_and_sizes_come_from_the_headers(directory):
    stored = safetensors_shapes(directory)
    assert stored == {
        "a": StoredTensor((7,), "F32", 28),
        "b": StoredTensor((3, 5), "BF16", 30),
        "s": StoredTensor((), "F32", 4),
    }
    assert [stored[name].n_elements for name in "abs"] == [7, 15, 1]


def test_the_hash_is_over_sorted_names_sizes_and_contents(directory):
    first, second = ((directory / f"x-{i}.safetensors").read_bytes() for i in (1, 2))
    expected = b"x-1.safetensors %d\n%bx-2.safetensors %d\n%b" % (len(first), first, len(second), second)
    assert weights_sha256(directory) == hashlib.sha256(expected).hexdigest()
    assert weights_bytes(directory) == len(first) + len(second)


def test_copied_tensors_are_the_same_bits_in_files_of_the_same_names(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    first = {"odd": torch.tensor([1, 2, 3], dtype=torch.int8), "kept": torch.randn(3, 5), "gone": torch.randn(2)}
    save_file(first | {"half": torch.randn(4, 3).bfloat16()}, source / "x-1.safetensors")
    save_file({"late": torch.randn(9)}, source / "x-2.safetensors")
    save_file({"all gone": torch.randn(9)}, source / "x-3.safetensors")
    names = {"odd", "kept", "half", "late"}
    copy_tensors(source, names, target)
    assert {file.name for file in target.iterdir()} == {"x-1.safetensors", "x-2.safetensors", INDEX}
    copied = load_file(target / "x-1.safetensors") | load_file(target / "x-2.safetensors")
    original = load_file(source / "x-1.safetensors") | load_file(source / "x-2.safetensors")
    assert copied.keys() == names
    assert all(torch.equal(copied[name], original[name]) for name in names)
    index = json.loads((target / INDEX).read_text())
    assert index["weight_map"] == {name: f"x-{2 if name == 'late' else 1}.safetensors" for name in names}
    assert index["metadata"] == {"total_size": 3 + 60 + 24 + 36}
    # Larger numbers first, so that each tensor begins where numbers of its size may.
    with safe_open(target / "x-1.safetensors", framework="np") as stored:
        assert (stored.offset_keys(), stored.metadata()) == (["kept", "half", "odd"], {"format": "pt"})


def test_a_file_that_was_cut_short_is_no_model(directory):
    file = directory / "x-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x-1.safetensors is not a safetensors file, or was cut short"):
        safetensors_shapes(directory)


@pytest.mark.parametrize("content", [b"", b"short", b"\x05" + 7 * b"\0" + b"nojsn", b"\xff" * 64])
def test_what_is_no_safetensors_file_says_so(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        safetensors_shapes(tmp_path)


def test_a_tensor_stored_twice_is_an_error(directory):
    save_file({"a": torch.zeros(7)}, directory / "x-3.safetensors")
    with pytest.raises(ValueError, match="a is stored twice"):
        safetensors_shapes(directory)


def test_no_weights_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        weights_sha256(tmp_path)
