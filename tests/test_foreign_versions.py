"""Versions that were made by hand or by other tools, or whose files were deleted: no command stops at them."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from dvc.repo import Repo
from example_versions import project, retained

from finercut.registry import versions
from finercut.registry.ledger import Ledger
from finercut.registry.versions import VersionReference
from pipelines import collect, paths, promote, status, watch

# What MLflow takes as the source of a version. Nothing is there.
SOURCES = (
    "runs:/{run_id}/model",
    "file:///nowhere/x",
    "s3://nowhere/x",
    "gs://nowhere/x",
    "ftp://127.0.0.1:9/x",
    "hdfs://127.0.0.1:9/x",
    "http://127.0.0.1:9/x",
    "strange://x",
)


@pytest.fixture
def here(tmp_path, monkeypatch, mlflow_store, tiny_model, tiny_pruned):
    """A project in the current directory that keeps one version."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # boto3 would ask for a minute for keys
    found = project(tmp_path, tiny_model, tiny_pruned)
    keep = found.params.collect.model_copy(update={"versions": 1, "unfinished_days": 1e-9})
    return replace(found, params=found.params.model_copy(update={"collect": keep}))


@pytest.fixture
def repository(here):
    """The project is a DVC repository too, so that all of a collection succeeds."""
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    commit = "git add -A; git -c user.name=t -c user.email=t@t commit -q -m t"
    subprocess.run(commit, shell=True, check=True)


def by_hand(here, source="runs:/{run_id}/model", name=None, **settings):
    """The number of a version that finercut did not make."""
    made = here.client.create_model_version(name or here.name, source.format(run_id=here.run.run_id), **settings)
    return str(made.version)


def promoted(here, wanted="challenger"):
    return promote.promote(here.params, here.name, wanted)


def collected(here):
    """What was deleted, and the problems."""
    found = collect.run(here.params, here.name)
    return [one.what for one in found.freed], found.problems


def has_checkpoint(here, version, name=None):
    found = here.client.get_model_version(name or here.name, version)
    return versions.stored(here.client, found).n_bytes("checkpoint") > 0


def test_promote_rollback_status_collect_and_register_pass_over_them(here, repository, caplog):
    first = here.register()
    foreign = [by_hand(here, source, run_id=run_id) for source in SOURCES for run_id in (None, here.run.run_id)]
    for number in foreign[:2]:
        here.client.create_model_version(here.name, f"models:/{here.name}/{number}")
    promoted(here, first)
    by_hand(here, name=f"{here.name}.promotions")
    by_hand(here, name=f"{here.name}.promotions", tags={"action": "promoted", "after": "1"})
    second = here.register(evaluate=retained(0.9))
    promoted(here, second)
    shown = status.text(here.params, here.name)
    assert shown.count("is not finercut's: it carries no evidence") == 9  # of the ten that are shown
    assert promote.rollback(here.name).message.endswith(f"version {first} is champion again, after version {second}")
    found = versions.find_version(here.run, here.name, here.tags(second)["finercut.pruned_md5"])
    assert found.version == second
    here.register()
    assert collected(here) == ([f"checkpoint of {here.name} version {second}"], [])
    assert f"versions of {here.name} that are not finercut's stay: {', '.join(foreign)}, " in caplog.text
    assert has_checkpoint(here, first)
    with pytest.raises(RuntimeError, match=rf"^{here.name} version {foreign[0]} is not finercut's: it carries no"):
        promoted(here, foreign[0])


def test_a_champion_that_somebody_registered_by_hand_is_accepted_replaced_and_gone_back_to(here, caplog):
    here.client.create_registered_model(here.name)
    foreign = by_hand(here, "s3://nowhere/x")  # by no run
    here.client.set_registered_model_alias(here.name, "champion", foreign)
    ours = here.register()
    with pytest.raises(RuntimeError, match=rf"accept it by `finercut promote {here.name} --version {foreign}`"):
        promoted(here)
    assert promoted(here, foreign).message.endswith("now accepted")
    assert promote.promote(here.params, here.name, ours, dry_run=True).message == (
        f"{here.name} version {ours} may take the place of version {foreign}"
    )
    outcome = promoted(here, ours)
    assert outcome.message == f"{here.name} version {ours} is champion, after version {foreign}"
    reason = f"version {foreign}, the champion, is not finercut's: it has no figures to compare with"
    assert {check.name: check.reason for check in outcome.judgement.checks}["champion"] == reason
    assert reason in caplog.text
    assert promote.rollback(here.name).message.endswith(f"version {foreign} is champion again, after version {ours}")
    assert here.aliases()["champion"] == foreign


def test_a_champion_that_was_deleted_stops_neither_promotion_nor_rollback(here):
    numbers = []
    for _ in range(3):
        numbers.append(here.register())
        promoted(here)
    here.client.delete_model_version(here.name, numbers[1])
    assert promote.rollback(here.name).message.endswith("version 1 is champion again, after version 3")
    here.client.delete_model_version(here.name, numbers[0])
    assert "Champion: none" in status.text(here.params, here.name)
    assert promoted(here, numbers[2]).message == f"{here.name} version 3 is champion, after no version"


def test_a_copy_of_a_version_is_judged_but_its_files_belong_to_the_original(here, repository, caplog):
    original = replace(here, params=with_name(here, f"{here.name}-source"))
    original.register()
    here.client.copy_model_version(f"models:/{original.name}/1", here.name)
    assert promoted(here, "1").message == f"{here.name} version 1 is champion, after no version"
    here.register()
    here.register()
    assert collected(here) == ([f"checkpoint of {here.name} version 2"], [])
    assert f"{here.name} version 1 has no files of its own, and stays" in caplog.text
    assert has_checkpoint(original, "1")


def test_a_version_that_was_copied_keeps_its_files(here, repository, caplog):
    elsewhere = f"{here.name}-production"
    for _ in range(3):
        here.register()
    here.client.create_registered_model(elsewhere)
    here.client.copy_model_version(f"models:/{here.name}/1", elsewhere)
    assert collected(here) == ([f"checkpoint of {here.name} version 2"], [])
    assert f"{here.name} version 1 stays: {elsewhere} version 1 has its files by reference" in caplog.text
    assert has_checkpoint(here, "1")
    # Nor is it an upload that no version came of, once the original is gone.
    here.client.delete_model_version(here.name, "1")
    old = datetime.now(UTC) + timedelta(days=1)
    assert list(versions.unregistered(here.client, here.params.flow.experiment, here.name, old)) == []


def with_name(here, name):
    return here.params.model_copy(update={"register_": here.params.register_.model_copy(update={"name": name})})


def upload(here):
    """The id of a logged model that no version came of."""
    made = here.client.create_logged_model(here.run.experiment_id, here.name, here.run.run_id)
    here.client.log_model_artifacts(made.model_id, str(paths.FINAL), "checkpoint")
    return made.model_id


def test_an_upload_that_somebody_registered_under_another_name_stays(here, repository):
    here.register()
    used, unused = upload(here), upload(here)
    here.client.create_registered_model(f"{here.name}-by-hand")
    by_hand(here, f"models:/{used}", name=f"{here.name}-by-hand")
    assert collected(here) == ([f"upload {unused} that no version came of"], [])
    assert {a.path for a in here.client.list_logged_model_artifacts(used)} == {"checkpoint"}


def test_one_upload_or_folder_that_cannot_be_deleted_keeps_no_other(here, repository):
    here.register()
    broken, whole = upload(here), upload(here)
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    folder = Path(here.client.get_logged_model(broken).artifact_location.removeprefix("file://"))
    shutil.rmtree(folder / "checkpoint")
    (folder / "checkpoint").symlink_to(elsewhere.absolute())  # what cannot be deleted as a folder
    work = paths.WORK / "fetch"
    work.mkdir(parents=True)
    (work / "a").symlink_to(elsewhere.absolute())
    (work / "b").mkdir()
    (work / "c").write_text("a file")
    freed, problems = collected(here)
    assert freed == [f"upload {whole} that no version came of", str(work / "b"), str(work / "c")]
    assert [problem.split(": ")[0] for problem in problems] == [
        f"upload {broken} that no version came of",
        str(work / "a"),
    ]


def test_a_version_whose_logged_model_was_deleted_is_registered_again_and_no_problem_of_a_collection(here, repository):
    first = here.register()
    model_id = here.client.get_model_version(here.name, first).source.removeprefix("models:/")
    md5 = here.tags(first)["finercut.pruned_md5"]
    assert versions.find_version(here.run, here.name, md5).version == first
    here.client.delete_logged_model(model_id)
    assert versions.find_version(here.run, here.name, md5) is None
    here.register()
    third = here.register()
    assert collected(here) == ([f"checkpoint of {here.name} version 2"], [])
    assert versions.find_version(here.run, here.name, md5).version == third


def test_a_store_that_cannot_be_read_is_a_problem_of_its_version_alone(here, repository):
    """Artifacts in S3, where boto3's errors are none of MLflow's, and in Azure, whose library is not installed."""
    here.register()
    for address in ("s3://nowhere/x", "wasbs://x@nowhere.blob.core.windows.net/x"):
        experiment = here.client.create_experiment(f"{here.name}-{address[:2]}", artifact_location=address)
        unreachable = here.client.create_logged_model(experiment, here.name)
        by_hand(here, f"models:/{unreachable.model_id}", tags={versions.PRUNED_MD5: "0.dir"})
    for _ in range(2):
        here.register()
    freed, problems = collected(here)
    assert freed == [f"checkpoint of {here.name} version {n}" for n in "14"]
    said = [f"checkpoint of {here.name} version {n}: cannot list stored files in MLflow at " for n in "23"]
    assert [problem[: len(said[0])] for problem in problems] == said
    assert "credentials" in problems[0]
    assert Ledger(here.client, here.name).read().collected == {"1", "4"}
    assert f"cannot download models:/{here.name}/2/evidence in MLflow at" in status.text(here.params, here.name)


def test_the_report_of_the_last_run_that_cannot_be_read_keeps_all_checkpoints(here, repository):
    here.register()
    here.register()
    paths.report("register").parent.mkdir(exist_ok=True)
    paths.report("register").write_text("{}")
    freed, problems = collected(here)
    assert freed == []
    assert "is not a RegisterReport" in problems[0]


def test_a_version_without_a_hash_has_a_folder_of_its_own_for_watchers(here, tmp_path):
    here.client.create_registered_model(here.name)
    found = []
    for content in ("one", "two"):
        folder = tmp_path / content / "checkpoint"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(content)
        number = by_hand(here, f"file://{folder.parent}")
        found.append(versions.find(here.client, VersionReference(here.name, number)))
        # The registered model is deleted and made anew: number 1 is another version.
        here.client.delete_registered_model(here.name)
        here.client.create_registered_model(here.name)
    assert [version.version for version in found] == [found[0].version] * 2
    assert len({watch._folder(version, Path("watched")) for version in found}) == 2
