"""A project directory in which fetch and calibrate have run, for the tests of the stages after them."""

import copy
import shutil
from pathlib import Path

from bad_input import VALID

from finercut.model.tensors import weights_sha256
from finercut.sources.records import FetchReport
from finercut.tokens import Tokens, write_tokens
from pipelines import params, paths


def settings(**changes) -> params.Params:
    """The project's params with dotted changes, for the tiny model."""
    values = copy.deepcopy(VALID)
    values["search"] |= {"mode": "exact", "candidates": "both", "per": None, "fill": False, "continuation_tokens": 4}
    for name, value in ({"search.dtype": "float32", "search.device": "cpu", "search.removals": 5} | changes).items():
        section, key = name.split(".")
        values[section][key] = value
    return params.Params.model_validate(values)


def with_changes(**changes):
    return settings(**{name.replace("__", "."): value for name, value in changes.items()})


def fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def fill(tiny_model: Path, tokens) -> None:
    """In the current folder."""
    shutil.copytree(tiny_model, paths.MODEL)
    write_tokens(fresh(paths.CALIBRATION), Tokens(tokens[:4], tokens[4:]), {})
    FetchReport(
        source="tiny",
        revision="1",
        sha256=weights_sha256(paths.MODEL),
        model_type="llama",
        n_blocks=4,
        n_parameters=543_872,
        weights_bytes=1,
        dtype="float32",
        vocab_size=400,
        max_position_embeddings=256,
    ).write(paths.report("fetch"))
