"""The pipeline on a team's servers: MLflow and Prefect on PostgreSQL, artifacts and DVC's remote in an S3 store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from prefect.client.orchestration import get_client
from test_flow import runs
from toy import ROOT, STAGES, make_toy

from pipelines.flow import compress

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def team(tmp_path, monkeypatch, prefect_server, mlflow_server, s3_store):
    """A toy clone, the current directory, of a machine that has keys of the store for DVC; where DVC pushes to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    for name, value in s3_store.environment.items():
        monkeypatch.setenv(name, value)
    make_toy()
    add_remote(f"s3://dvc/{tmp_path.name}")
    return tmp_path


def add_remote(url):
    subprocess.run([sys.executable, "-m", "dvc", "remote", "add", "-q", "-f", "-d", "store", url], check=True)


def objects(store, bucket, prefix=""):
    return [item["Key"] for item in store.client().list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])]


def test_results_are_pushed_recorded_and_registered_and_another_clone_pulls_them(
    team, tmp_path_factory, monkeypatch, s3_store, mlflow_server
):
    first = compress(push=True)
    assert first.status == "registered"
    # the run, and the version's checkpoint, lie in the store; keys were needed by the server alone
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias(first.name, "challenger")
    downloaded = Path(mlflow.artifacts.download_artifacts(f"models:/{first.name}@challenger"))
    assert (downloaded / "checkpoint/model.safetensors").read_text() == "weights"
    assert any(key.endswith("checkpoint/model.safetensors") for key in objects(s3_store, "mlflow"))
    assert version.source.startswith("models:/")
    pushed = objects(s3_store, "dvc", team.name)
    assert any("/runs/" in key for key in pushed)  # what belongs to which inputs, and not only the files

    clone = tmp_path_factory.mktemp("clone")
    subprocess.run(["git", "clone", "-q", str(team), str(clone)], check=True)
    monkeypatch.chdir(clone)
    add_remote(f"s3://dvc/{team.name}")
    second = compress(pull=True)
    assert (second.status, second.version) == ("already registered", first.version)
    newest = runs(team.name)[0]
    assert [newest.data.tags[f"stage.{name}"] for name in STAGES] == ["cached"] * 3

    with get_client(sync_client=True) as prefect:
        keys = {artifact.key for artifact in prefect.read_artifacts()}
    assert {"finercut-summary", "finercut-mlflow-run"} <= keys


def test_what_cannot_be_pushed_fails_the_run_before_a_version_exists(team, s3_store):
    add_remote("s3://no-such-bucket/here")
    with pytest.raises(RuntimeError, match=r"^push: .*"):
        compress(push=True)
    (run,) = runs(team.name)
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"].startswith("push: ")
    assert mlflow.MlflowClient().search_model_versions(f"name = '{team.name}'") == []
    # nothing is computed again once there is a place to push to
    add_remote(f"s3://dvc/{team.name}")
    assert compress(push=True).status == "registered"
    newest = runs(team.name)[0]
    assert [newest.data.tags[f"stage.{name}"] for name in STAGES] == ["cached"] * 3


def test_without_a_remote_to_push_to_nothing_is_started(team):
    subprocess.run([sys.executable, "-m", "dvc", "remote", "remove", "-q", "store"], check=True)
    with pytest.raises(RuntimeError, match=r"^nothing to push to: name a DVC remote with `dvc remote add --default"):
        compress(push=True)
    assert not Path("reports").exists()
