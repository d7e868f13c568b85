"""What finercut 0.1.0 wrote is still loaded, continued, promoted and rolled back; tests/fixtures/v0_1 has it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from fixtures.v0_1.restore import restore
from transformers import AutoModelForCausalLM

from finercut.checkpoint.lineage import lineage_of
from finercut.checkpoint.parity import check_parity
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load_pruned, load_whole
from finercut.registry import versions
from finercut.registry.ledger import Ledger
from finercut.selection.greedy import search
from finercut.selection.trajectory import read_trajectory
from finercut.tokens import load_tokens
from pipelines import inspection, paths, promote, status
from pipelines.params import Params

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).parent / "fixtures" / "v0_1"
NAME = "finercut-tiny"


def recorded_logits():
    recorded = json.loads((OLD / "logits.json").read_text())
    return recorded, torch.tensor(recorded["logits"])


def test_its_checkpoint_computes_what_it_did():
    recorded, expected = recorded_logits()
    model = load_pruned(OLD / "checkpoint", torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([recorded["tokens"]])).logits[0, recorded["positions"]]
    assert torch.allclose(logits, expected, atol=2e-6)
    assert lineage_of(ModelDirectory(OLD / "checkpoint")) == []
    assert "3 of 8 sublayers removed" in inspection.describe(str(OLD / "checkpoint"))


def test_its_checkpoint_loads_with_finercut_imported_and_without_it_through_its_own_file():
    recorded, expected = recorded_logits()
    ids = torch.tensor([recorded["tokens"]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(OLD / "checkpoint")(ids).logits[0, recorded["positions"]]
    assert torch.allclose(logits, expected, atol=2e-6)
    code = (
        "import sys; sys.modules['finercut'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"
    )
    shown = subprocess.check_output([sys.executable, "-c", code, str(OLD / "checkpoint")], text=True)
    assert shown.split()[-1] == "FinerCutLlamaForCausalLM"


def test_its_checkpoint_is_still_the_masked_whole_model():
    directories = ModelDirectory(OLD / "whole"), ModelDirectory(OLD / "checkpoint")
    tokens = load_tokens(OLD / "calibration")
    assert check_parity(*directories, tokens.held_out, 1e-4, torch.device("cpu")).passed


def search_anew(old: Path) -> None:
    """Print what the recorded search finds now, in a process of its own: `python test_older_versions.py DIRECTORY`."""
    torch.set_num_threads(1)
    tokens = load_tokens(old / "calibration")
    n_removals = len(read_trajectory(old / "trajectory.jsonl").removals)
    found = search(load_whole(old / "whole", torch.float32), tokens.calibration, tokens.held_out, n_removals)
    print(json.dumps([[str(r.sublayer), r.divergence, r.held_out_divergence, r.values] for r in found]))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="was recorded with AVX2")
def test_a_search_finds_its_removals_and_divergences_to_the_last_bit():
    old = read_trajectory(OLD / "trajectory.jsonl")
    # Sums come out otherwise with AVX-512, in the last bits.
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.check_output([sys.executable, __file__, str(OLD)], env=environment, text=True)
    assert json.loads(printed.splitlines()[-1]) == [
        [str(r.sublayer), r.divergence, r.held_out_divergence, r.values] for r in old.removals
    ]


@pytest.fixture
def registry(mlflow_store, tmp_path, monkeypatch):
    """The registry that it left, and a workspace with the whole model that its versions come from."""
    client = mlflow.MlflowClient()
    for model in client.search_registered_models():
        if model.name.startswith(NAME):
            client.delete_registered_model(model.name)
    experiment = client.get_experiment_by_name("old") or client.get_experiment(client.create_experiment("old"))
    restore(client, experiment.experiment_id)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "whole", paths.MODEL)
    return client


def settings(**promote_changes):
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["prove"]["device"] = "cpu"
    values["promote"] |= promote_changes
    return Params.model_validate(values)


def test_its_promotions_are_read_rolled_back_and_promoted_again(registry):
    assert Ledger(registry, NAME).read().champions == ("1", "2")
    shown = status.text(settings(allow_limited=True), NAME)
    assert "Champion: version 2, promoted" in shown
    assert promote.rollback(NAME, reason="a trial").message == f"{NAME} version 1 is champion again, after version 2"
    outcome = promote.promote(settings(allow_limited=True), NAME, "2", "again")
    assert outcome.message == f"{NAME} version 2 is champion, after version 1"
    checks = {check.name: check for check in outcome.judgement.checks}
    assert checks["claim.prune"].passed
    assert checks["parity_again"].passed
    assert checks["weights_sha256"].passed
    assert Ledger(registry, NAME).aliases() == {"champion": "2", "previous": "1", "challenger": "2"}


def test_its_versions_are_described_and_downloaded(registry, tmp_path):
    shown = inspection.describe(f"models:/{NAME}@champion").splitlines()
    assert shown[0].split(None, 1) == ["model", f"{NAME} version 2"]
    version = versions.find(registry, versions.VersionReference(NAME, "champion"))
    directory = versions.download(version, "checkpoint", tmp_path / "down")
    assert [str(s) for s in ModelDirectory(directory).removed] == ["0.attention", "2.attention", "3.mlp"]


if __name__ == "__main__":
    search_anew(Path(sys.argv[1]))
