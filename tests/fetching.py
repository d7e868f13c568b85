"""The stage `fetch` on a source alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hub_server import ROOT

from pipelines import fetch
from pipelines.params import Params, load


def params(source: dict) -> Params:
    values = load(ROOT / "params.yaml").model_dump(by_alias=True)
    values["evaluate"]["tasks"] = []
    return Params.model_validate(values | {"fetch": {"source": source}})


def fetched_by_stage(source: dict, directory: Path, monkeypatch) -> fetch.FetchReport:
    monkeypatch.chdir(directory)
    return fetch.run(params(source))


def copy_of(model: Path, directory: Path, **config) -> Path:
    """A copy with changes to its config.json."""
    shutil.copytree(model, directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory
