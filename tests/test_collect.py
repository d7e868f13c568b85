"""What is freed and what stays, in real MLflow stores and in a real DVC repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from dvc.repo import Repo
from example_versions import project
from holder import holding

from finercut.registry import versions
from finercut.registry.ledger import Ledger
from finercut.registry.records import RegisterReport
from pipelines import collect, paths
from pipelines.cli import main

DAY_S = 86_400


@pytest.fixture
def here(tmp_path, monkeypatch, mlflow_store, tiny_model, tiny_pruned):
    """A project that is a DVC repository and keeps one version and one commit; its registry is in SQLite."""
    monkeypatch.chdir(tmp_path)
    return repository(tmp_path, tiny_model, tiny_pruned)


@pytest.fixture
def on_server(tmp_path, monkeypatch, mlflow_server, tiny_model, tiny_pruned):
    """Such a project whose registry is a server with an S3 store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return repository(tmp_path, tiny_model, tiny_pruned)


def repository(directory, whole, pruned):
    found = project(directory, whole, pruned)
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    commit()
    keep = found.params.collect.model_copy(update={"versions": 1, "commits": 1, "unfinished_days": 7.0})
    return type(found)(found.params.model_copy(update={"collect": keep}), found.run)


def commit():
    subprocess.run("git add -A; git -c user.name=t -c user.email=t@t commit -q -m t", shell=True, check=True)


def freed(here, **options):
    collected = collect.run(here.params, here.name, **options)
    if collected.problems:
        raise RuntimeError("; ".join(collected.problems))
    return {f.what: f.n_bytes for f in collected.freed}


def folders(here, version):
    """Of a version, in the store."""
    model_id = here.client.get_model_version(here.name, version).source.removeprefix("models:/")
    return {a.path for a in here.client.list_logged_model_artifacts(model_id)} & {"checkpoint", "evidence"}


def report_of_last_run(here, version):
    RegisterReport(
        status="already registered",
        passed=True,
        checks=[],
        name=here.name,
        version=version,
        model_uri="",
        run_id="",
        tracking_uri="",
    ).write(paths.report("register"))


def test_checkpoints_go_but_for_the_newest_the_last_runs_and_those_with_an_alias(on_server, tiny_pruned):
    here = on_server
    for _ in range(7):
        here.register()
    ledger = Ledger(here.client, here.name)
    run_id = here.run.run_id
    for version in "12":
        assert ledger.append(ledger.read(), "promoted", version, run_id)
    ledger.settle()
    here.client.set_registered_model_alias(here.name, "canary", "4")
    report_of_last_run(here, "5")
    size = sum(file.stat().st_size for file in tiny_pruned.iterdir())
    expected = {f"checkpoint of {here.name} version {v}": size for v in "36"}

    assert freed(here, dry_run=True) == expected
    assert all(folders(here, v) == {"checkpoint", "evidence"} for v in "1234567")
    assert ledger.read().collected == set()

    assert freed(here) == expected
    gone = {v for v in "1234567" if "checkpoint" not in folders(here, v)}
    assert gone == {"3", "6"}
    assert all("evidence" in folders(here, v) for v in "1234567")
    assert ledger.read().collected == {"3", "6"}
    downloaded = versions.download(here.client.get_model_version(here.name, "1"), "checkpoint", Path("again"))
    assert {p.name: p.read_bytes() for p in downloaded.iterdir()} == {
        p.name: p.read_bytes() for p in tiny_pruned.iterdir()
    }
    assert freed(here) == {}


def test_what_a_killed_collection_left_is_deleted_by_the_next(here):
    for _ in range(2):
        here.register()
    ledger = Ledger(here.client, here.name)
    here.client.delete_registered_model_alias(here.name, "challenger")
    assert ledger.append(ledger.read(), "collected", "1", here.run.run_id)
    assert list(freed(here)) == [f"checkpoint of {here.name} version 1"]
    assert folders(here, "1") == {"evidence"}


def test_a_champion_the_alias_does_not_show_yet_stays(here):
    for _ in range(3):
        here.register()
    ledger = Ledger(here.client, here.name)
    ledger.append(ledger.read(), "promoted", "1", here.run.run_id)
    ledger.append(ledger.read(), "promoted", "2", here.run.run_id)
    assert freed(here) == {}


def test_uploads_that_no_version_came_of_go_once_they_are_old(on_server):
    here = on_server
    here.register()
    upload = here.client.create_logged_model(here.run.experiment_id, here.name, here.run.run_id)
    here.client.log_model_artifacts(upload.model_id, str(paths.FINAL), "checkpoint")
    assert freed(here) == {}
    at_once = here.params.collect.model_copy(update={"unfinished_days": 1e-9})
    here = type(here)(here.params.model_copy(update={"collect": at_once}), here.run)
    size = sum(file.stat().st_size for file in paths.FINAL.iterdir())
    assert freed(here) == {f"upload {upload.model_id} that no version came of": size}
    assert folders(here, "1") == {"checkpoint", "evidence"}
    assert freed(here) == {}


def add(text):
    Path("data").write_text(text)
    with Repo() as repo:
        repo.add("data")


def in_cache():
    """What DVC's cache holds of the files of text that `add` wrote."""
    return {p.read_text() for p in Path(".dvc/cache/files").rglob("*") if p.is_file()}


def test_dvc_keeps_the_results_of_the_workspace_and_of_the_last_commits(here):
    here.register()
    for text in ("first commit", "second commit"):
        add(text)
        commit()
    for text in ("not committed", "in the workspace"):
        add(text)
    expected = {"2 files of DVC's cache": len("first commit") + len("not committed")}
    assert freed(here, dry_run=True) == expected
    assert len(in_cache()) == 4
    assert freed(here) == expected
    assert in_cache() == {"second commit", "in the workspace"}


@pytest.mark.parametrize("how", ["configured", "linked"])
def test_a_cache_outside_the_project_is_left_alone(here, tmp_path_factory, how):
    here.register()
    shared = tmp_path_factory.mktemp("cache")
    if how == "linked":
        shutil.rmtree(".dvc/cache", ignore_errors=True)
        Path(".dvc/cache").symlink_to(shared)
    else:
        with Repo() as repo, repo.config.edit("local") as settings:
            settings["cache"] = {"dir": str(shared)}
    add("first")
    add("second")
    assert freed(here) == {"nothing of DVC's cache, which is outside the project and may be shared": 0}
    assert len([p for p in shared.rglob("*") if p.is_file()]) >= 2


def test_without_a_repository_it_says_so(here):
    here.register()
    shutil.rmtree(".dvc")
    with pytest.raises(RuntimeError, match=r"^DVC: .*run from the root of a clone of the project$"):
        freed(here)


def aged(path, days):
    path.parent.mkdir(parents=True)
    path.write_text("1234567")
    then = time.time() - days * DAY_S
    os.utime(path, (then, then))
    os.utime(path.parent, (then, then))


def test_of_the_work_folders_the_newest_searches_and_fresh_downloads_stay(here):
    here.register()
    old, new = (paths.WORK / "search" / key / "trajectory.jsonl" for key in ("aaaa", "bbbb"))
    abandoned, under_way = (paths.WORK / "fetch" / key / "model" for key in ("old", "new"))
    left = paths.WORK / "promote" / "x" / "model"
    for path, days in ((old, 2), (new, 1), (abandoned, 8), (under_way, 6), (left, 8)):
        aged(path, days)
    assert freed(here) == {str(path.parent): 7 for path in (old, abandoned, left)}
    assert [p.exists() for p in (old, new, abandoned, under_way, left)] == [False, True, False, True, False]


def test_the_command_lists_what_would_go_with_its_bytes(here):
    here.register()
    add("x" * 2**20)
    add("y")
    said = CliRunner().invoke(main, ["collect", "--dry-run"])
    assert said.exit_code == 0
    assert said.stdout == "   1.0 MiB  1 files of DVC's cache\n   1.0 MiB  would be freed\n"


def test_while_a_stage_is_at_work_here_nothing_goes(here):
    for _ in range(2):
        here.register()
    here.client.delete_registered_model_alias(here.name, "challenger")
    add("first")
    add("second")
    with holding() as other:
        said = CliRunner().invoke(main, ["collect"])
        assert said.exit_code == 1
        assert said.stderr == (
            f"finercut collect: process {other.pid} works in {Path.cwd()}: wait until it has ended, or end it\n"
        )
        assert folders(here, "1") == {"checkpoint", "evidence"}
        assert in_cache() == {"first", "second"}
        assert len(freed(here, dry_run=True)) == 2
    assert len(freed(here)) == 2
    assert in_cache() == {"second"}


def test_before_the_first_version_the_workspace_is_freed_but_a_name_that_somebody_gives_must_exist(here):
    add("first")
    add("second")
    with pytest.raises(RuntimeError, match=rf"^cannot find {here.name} in MLflow"):
        freed(here)
    assert [f.what for f in collect.free(here.params, here.name, here.client).freed] == ["1 files of DVC's cache"]


def test_where_no_registry_answers_this_machine_is_freed_all_the_same(here, monkeypatch):
    add("first")
    add("second")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    said = CliRunner().invoke(main, ["collect"])
    assert said.exit_code == 1
    assert "1 files of DVC's cache" in said.stdout
    assert f"not deleted: cannot find {here.name} in MLflow at http://127.0.0.1:9" in said.stdout


def test_before_the_first_version_the_command_frees_the_workspace(here):
    add("first")
    add("second")
    said = CliRunner().invoke(main, ["collect"])
    assert said.exit_code == 0, said.stdout
    assert "1 files of DVC's cache" in said.stdout


def test_what_cannot_be_deleted_keeps_nothing_else_and_is_told_at_the_end(here):
    for _ in range(3):
        here.register()
    experiment = here.client.create_experiment(f"{here.name}-gone", artifact_location="strange://nowhere")
    unreachable = here.client.create_logged_model(experiment, here.name)
    tags = {versions.PRUNED_MD5: "0.dir"}
    here.client.create_model_version(here.name, f"models:/{unreachable.model_id}", here.run.run_id, tags=tags)
    here.register()
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("versions: 3", "versions: 1"))
    said = CliRunner().invoke(main, ["collect"])
    assert said.exit_code == 1
    freed = [f"checkpoint of {here.name} version {n}" for n in "123"]
    assert [line.partition("MiB  ")[2] for line in said.stdout.splitlines()[:3]] == freed
    assert said.stdout.splitlines()[-1].startswith(
        f"not deleted: checkpoint of {here.name} version 4: cannot list stored files in MLflow at "
    )
    # It is not written off in the log, and the next collection ends as well.
    assert len(collect.run(here.params, here.name).problems) == 1
    assert Ledger(here.client, here.name).read().collected == set("123")
