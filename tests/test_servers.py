"""The pipeline on a team's servers: MLflow and Prefect on PostgreSQL, artifacts and DVC's remote in an S3 store."""

from __future__ import annotations

import re
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest
from prefect.client.orchestration import get_client
from test_flow import runs
from toy import ROOT, STAGES, TOY, make_toy, write

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
    assert any(key.endswith("checkpoint/model.safetensors") for key in s3_store.objects("mlflow"))
    assert version.source.startswith("models:/")
    pushed = s3_store.objects("dvc", team.name)
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
        told = {artifact.key: artifact.data for artifact in prefect.read_latest_artifacts()}
    page = f"{newest.info.run_id}/artifacts/reports/report.html?workflowType=machine_learning)"
    assert page in told["finercut-summary"]
    assert f"/runs/{newest.info.run_id}?workflowType=machine_learning)" in told["finercut-mlflow-run"]


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


def test_without_a_remote_to_push_to_or_pull_from_nothing_is_started(team):
    subprocess.run([sys.executable, "-m", "dvc", "remote", "remove", "-q", "store"], check=True)
    with pytest.raises(RuntimeError, match=r"^nothing to push to: name a DVC remote with `dvc remote add --default"):
        compress(push=True)
    with pytest.raises(RuntimeError, match="^nothing to pull from: name a DVC remote"):
        compress(pull=True)
    assert not Path("reports").exists()


# What a team's machine is given, with a made-up secret in each.
SECRETS = {
    "HF_TOKEN": "canary-hub",
    "AWS_ACCESS_KEY_ID": "canary-access",
    "AWS_SECRET_ACCESS_KEY": "canary-secret",
    "PREFECT_API_KEY": "canary-prefect",
    "PREFECT_API_AUTH_STRING": "admin:canary-auth",
    "FINERCUT_WEBHOOK": "https://hooks.example.org/services/canary-webhook?token=canary-query",
}
SHOWN = "not-a-secret"


def test_no_credential_is_kept_or_shown_by_a_run_whose_stages_print_and_fail_with_them(
    team, monkeypatch, postgres, s3_store, mlflow_server, prefect_server
):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.replace("//", "//me:canary-password@"))
    monkeypatch.setenv("ORDINARY", SHOWN)
    printing = STAGES["prune"] | {"cmd": f"env && env >&2 && {TOY} model"}
    write(stages=STAGES | {"prune": printing})
    said = [finercut("run")]
    assert said[0].returncode == 0, said[0].stderr
    cause = "cannot reach $MLFLOW_TRACKING_URI with $HF_TOKEN, tell $FINERCUT_WEBHOOK of $ORDINARY"
    failing = STAGES["evaluate"] | {"cmd": f'echo "finercut evaluate: {cause}" >&2; exit 1'}
    write(stages=STAGES | {"prune": printing, "evaluate": failing})
    said.append(finercut("run"))
    assert said[1].returncode == 1
    assert SHOWN in said[1].stderr.splitlines()[-1]

    kept = {f"stdout and stderr {n}": done.stdout + done.stderr for n, done in enumerate(said)}
    kept |= {str(file): text_of(file.read_bytes()) for file in team.rglob("*") if file.is_file()}
    for database in ("mlflow", "prefect"):
        dump = [postgres.programs / "pg_dump", "--inserts", postgres.uri(database)]
        kept[database] = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    client = s3_store.client()
    for bucket in ("mlflow", "dvc"):
        for key in s3_store.objects(bucket):
            kept[f"s3://{bucket}/{key}"] = text_of(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    assert {where: found for where, text in kept.items() if (found := re.findall(r"canary-\w+", text))} == {}
    # the search would have found them: what was printed beside them is there
    shown = {where for where, text in kept.items() if SHOWN in text}
    assert {"stdout and stderr 0", "stdout and stderr 1", "mlflow", "prefect"} <= shown
    assert any(where.startswith("s3://mlflow/") and where.endswith("/log.txt") for where in shown)


def finercut(*arguments):
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def text_of(content):
    """As it can be searched: databases and packed objects of git too."""
    with suppress(zlib.error):
        content = zlib.decompress(content)
    return content.decode("utf-8", errors="replace")
