"""Promotion and rollback in real MLflow stores, with a real checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from example_versions import project, retained, task
from safetensors.torch import load_file, save_file

from finercut.registry import versions
from finercut.registry.ledger import Ledger
from pipelines import paths, promote, recheck, status
from pipelines.cli import main
from pipelines.promote import NotPromoted


@pytest.fixture
def here(tmp_path, monkeypatch, mlflow_store, tiny_model, tiny_pruned):
    """A project in the current directory, whose registry is in SQLite."""
    monkeypatch.chdir(tmp_path)
    return project(tmp_path, tiny_model, tiny_pruned)


@pytest.fixture
def on_server(tmp_path, monkeypatch, mlflow_server, tiny_model, tiny_pruned):
    """A project in the current directory, whose registry is a server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return project(tmp_path, tiny_model, tiny_pruned)


def promoted(here, wanted="challenger", **options):
    return promote.promote(here.params, here.name, wanted, **options).message


def ledger(here):
    return Ledger(here.client, here.name)


def test_a_challenger_becomes_champion_once_and_who_when_why_and_what_before_are_kept(on_server):
    here = on_server
    here.register()
    assert promoted(here, reason="first") == f"{here.name} version 1 is champion, after no version"
    assert promoted(here) == f"{here.name} version 1 is already champion"
    here.register(evaluate=retained(0.74))
    assert promoted(here, reason="release 2") == f"{here.name} version 2 is champion, after version 1"
    assert here.aliases() == {"challenger": "2", "champion": "2", "previous": "1"}

    (first, second) = ledger(here).read().entries
    assert (first.before, second.before, second.reason, second.action) == (None, "1", "release 2", "promoted")
    assert here.tags("2")["promotion"].endswith(f"UTC, promoted by {second.by}, from version 1: release 2")
    assert here.tags("2")["promotion.entry"] == f"{here.name}.promotions 2"
    record = here.client.get_model_version(f"{here.name}.promotions", "2").description
    assert "| retention " in record
    assert "| parity_again " in record
    assert list(recheck.WORK.iterdir()) == []


def test_one_that_is_worse_is_refused_with_the_reason_on_the_version(here):
    here.register()
    promoted(here)
    here.register(evaluate=retained(0.7))
    reason = r"retention is 0\.7 over 1 common tasks; at least 0\.74 is required"
    with pytest.raises(NotPromoted, match=rf"version 2 does not take the place of version 1: {reason}$"):
        promoted(here)
    assert here.aliases()["champion"] == "1"
    assert here.tags("2")["promotion.refused"].startswith("against version 1: retention is 0.7")
    assert len(ledger(here).read().entries) == 1
    # a rule that lets it through takes the note away
    changed = here.params.promote.model_copy(update={"max_retention_drop": 0.1})
    promote.promote(here.params.model_copy(update={"promote": changed}), here.name, "2")
    assert "promotion.refused" not in here.tags("2")


def test_the_gate_of_today_counts_and_so_does_evaluation_in_part(here):
    here.register(throughput={"speed_up": 0.9})
    with pytest.raises(NotPromoted, match=r"speed_up is 0\.9; at least 1 is required$"):
        promoted(here)
    here.register(evaluate={"tasks": {"finercut_copying": task(0.75, n_samples=10)}})
    with pytest.raises(NotPromoted, match=r"evaluated in part: finercut_copying \(10 of 100\); promote\.allow"):
        promoted(here)
    assert "champion" not in here.aliases()


def test_a_dry_run_compares_and_writes_nothing(here):
    here.register()
    outcome = promote.promote(here.params, here.name, "1", dry_run=True)
    assert outcome.message == f"{here.name} version 1 may take the place of no version"
    assert {c.name for c in outcome.judgement.checks} >= {"claim.prune", "mean_retention", "limited_tasks"}
    here.register(throughput={"speed_up": 0.9})
    with pytest.raises(NotPromoted):
        promote.promote(here.params, here.name, "2", dry_run=True)
    assert here.aliases() == {"challenger": "2"}
    assert "promotion.refused" not in here.tags("2")
    assert ledger(here).read().last == 0
    assert not recheck.WORK.exists()


def damaged(tiny_pruned, directory, change):
    shutil.copytree(tiny_pruned, directory)
    change(directory)
    return directory


def scaled(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 1.5
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "evidence", "reason"),
    [
        (scaled, {}, r"repeated parity is [\d.]+; at most 0\.001 is required"),
        (lambda d: None, {"prune": {"sha256": "9" * 64}}, r"weights_sha256 of the downloaded .*, 9{12} is required"),
        (
            lambda d: (d / "pytorch_model.bin").write_bytes(b"cos\nsystem\n"),
            {},
            r"the checkpoint holds pytorch_model\.bin",
        ),
        (lambda d: (d / "license.PKL").write_bytes(b"cos\nsystem\n"), {}, r"the checkpoint holds license\.PKL"),
    ],
)
def test_a_checkpoint_that_is_not_what_was_proved_is_refused(here, tiny_pruned, change, evidence, reason):
    here.register(damaged(tiny_pruned, Path("damaged"), change), **evidence)
    with pytest.raises(NotPromoted, match=reason):
        promoted(here)
    assert "champion" not in here.aliases()


def with_licences(directory):
    for name in (
        "LICENSE",
        "NOTICE",
        "LICENSE.pdf",
        "USE_POLICY.md",
        "LICENSE.TXT",
        "LICENSE-APACHE-2.0",
        "licence.rtf",
    ):
        (directory / name).write_text("Do no harm.")


def test_a_checkpoint_with_the_licences_of_its_whole_model_is_promoted(here, tiny_pruned):
    here.register(damaged(tiny_pruned, Path("licensed"), with_licences))
    assert promoted(here) == f"{here.name} version 1 is champion, after no version"


def test_a_file_that_changed_in_the_store_is_refused(on_server):
    here = on_server
    here.register()
    model_id = here.client.get_model_version(here.name, "1").source.removeprefix("models:/")
    config = json.loads((paths.FINAL / "config.json").read_text())
    Path("config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    here.client.log_model_artifact(model_id, "config.json")
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    get_artifact_repository(here.client.get_logged_model(model_id).artifact_location).log_artifact(
        "config.json", "checkpoint"
    )
    with pytest.raises(NotPromoted, match=r"files_md5 of the downloaded checkpoint is \w{12}, \w{12} is required$"):
        promoted(here)


def test_the_whole_model_is_fetched_again_where_the_project_holds_another(here):
    here.register()
    shutil.rmtree(paths.MODEL)
    assert promoted(here).startswith(f"{here.name} version 1 is champion")


def test_without_the_whole_model_there_is_no_promotion(here, tiny_model):
    here.register(fetch={"sha256": "8" * 64})
    with pytest.raises(RuntimeError, match=r"whole model of version 1 is no longer what it was: .* instead of 8{12}"):
        promoted(here)
    settings = Path("params.yaml").read_text().replace(str(tiny_model), "/nowhere")
    Path("params.yaml").write_text(settings)
    here.register()
    shutil.rmtree(paths.MODEL)
    with pytest.raises(RuntimeError, match=r"whole model of version 2 cannot be had again: .*no directory /nowhere"):
        promoted(here)
    assert "champion" not in here.aliases()


def test_md5_is_the_one_dvc_records(tmp_path, tiny_pruned):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copytree(tiny_pruned, tmp_path / "pruned")
    (tmp_path / "pruned" / "sub").mkdir()
    (tmp_path / "pruned" / "sub" / "a").write_text("a")
    for command in (["init", "-q"], ["add", "-q", "pruned"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=tmp_path, check=True)
    assert f"md5: {recheck.directory_md5(tmp_path / 'pruned')}\n" in (tmp_path / "pruned.dvc").read_text()


def three_champions(here):
    for _ in range(3):
        here.register()
        promoted(here)


def test_a_version_whose_checkpoint_was_deleted_does_not_become_champion_again(here):
    three_champions(here)
    version = here.client.get_model_version(here.name, "2")
    versions.stored(here.client, version).delete(versions.CHECKPOINT)
    with pytest.raises(RuntimeError, match=f"the checkpoint of {here.name} version 2 was deleted: it cannot serve"):
        promote.rollback(here.name)
    assert here.aliases()["champion"] == "3"


def test_a_rollback_undoes_the_last_promotion_once_and_goes_further_back_when_told(here):
    three_champions(here)
    said = promote.rollback(here.name, reason="copies badly").message
    assert said == f"{here.name} version 2 is champion again, after version 3"
    assert here.aliases() == {"challenger": "3", "champion": "2", "previous": "1"}
    again = promote.rollback(here.name).message
    assert again.startswith(f"{here.name} version 2 is champion already, rolled back by ")
    assert again.endswith("; `--to` goes further back, to 1")
    assert promote.rollback(here.name, to="1").message.endswith("version 1 is champion again, after version 2")
    assert promote.rollback(here.name, to="1").message.startswith(f"{here.name} version 1 is champion already")
    assert here.aliases() == {"challenger": "3", "champion": "1"}
    assert ledger(here).read().move.action == "rolled back"
    with pytest.raises(RuntimeError, match=rf"^{here.name} has no version 3 to go back to; former: none$"):
        promote.rollback(here.name, to="3")
    # and forward once more, from where it went back to
    assert promoted(here) == f"{here.name} version 3 is champion, after version 1"
    assert promote.rollback(here.name).message.endswith("version 1 is champion again, after version 3")


def test_there_is_nothing_to_roll_back_before_a_second_champion(here):
    here.register()
    with pytest.raises(RuntimeError, match=r"has no version before this one to go back to; former: none$"):
        promote.rollback(here.name)
    promoted(here)
    with pytest.raises(RuntimeError, match=r"has no version before this one to go back to; former: none$"):
        promote.rollback(here.name)
    assert here.aliases()["champion"] == "1"


def test_a_champion_moved_by_hand_is_accepted_or_undone_by_word_only(here):
    three_champions(here)
    here.client.set_registered_model_alias(here.name, "champion", "1")
    here.register()
    moved = rf"champion of {here.name} was moved to version 1 outside finercut, its log says version 3: accept it by "
    with pytest.raises(RuntimeError, match=moved):
        promoted(here)
    assert "moved there outside finercut; the log says version 3" in status.text(here.params, here.name)
    assert "now accepted" in promoted(here, "1", reason="fire")
    assert ledger(here).read().move.action == "accepted"
    assert here.aliases() == {"challenger": "4", "champion": "1"}
    assert promoted(here) == f"{here.name} version 4 is champion, after version 1"

    here.client.delete_registered_model_alias(here.name, "champion")
    assert promote.rollback(here.name).message == f"{here.name} version 4 is champion again, after no version"
    assert here.aliases()["champion"] == "4"


def test_a_move_that_was_cut_short_is_completed_by_the_next_command(here):
    here.register()
    promoted(here)
    here.register()
    book = ledger(here)
    run_id = here.client.get_model_version(here.name, "2").run_id
    assert book.append(book.read(), "promoted", "2", run_id)  # and killed before it moved the alias
    assert "The alias is still at version 1" in status.text(here.params, here.name)
    assert promoted(here) == f"{here.name} version 2 is already champion"
    assert here.aliases() == {"challenger": "2", "champion": "2", "previous": "1"}


def test_what_was_collected_is_neither_promoted_nor_rolled_back_to(here):
    three_champions(here)
    book = ledger(here)
    assert book.append(book.read(), "collected", "2", here.run.run_id)
    with pytest.raises(RuntimeError, match=r"checkpoint of .* version 2 was collected: it cannot serve$"):
        promote.rollback(here.name)
    with pytest.raises(NotPromoted, match=r"checkpoint of .* version 2 was collected: compress again to have it back$"):
        promoted(here, "2")


def test_one_that_was_overtaken_while_it_checked_compares_again_with_the_new_champion(here):
    here.register()
    promoted(here)
    here.register(evaluate=retained(0.8))
    here.register(evaluate=retained(0.9))

    class Overtake(logging.Handler):
        """Promotes version 3 at the moment when version 2 has passed the comparison and its files are checked."""

        def emit(self, record):
            if "repeating the parity check" in record.getMessage():
                logging.getLogger("finercut").removeHandler(self)
                promoted(here, "3")

    logger = logging.getLogger("finercut")
    logger.addHandler(Overtake(logging.INFO))
    logger.setLevel(logging.INFO)
    with pytest.raises(NotPromoted, match=r"version 2 does not take the place of version 3: retention is 0\.8"):
        promoted(here, "2")
    state = ledger(here).read()
    assert [(e.version, e.before) for e in state.entries] == [("1", None), ("3", "1")]
    assert state.last == 3  # version 2's entry came too late to count
    assert here.aliases()["champion"] == "3"


def test_the_command_prints_the_comparison_and_one_line_why_not(on_server):
    here = on_server
    here.register(throughput={"speed_up": 0.9})
    said = CliRunner().invoke(main, ["promote", "--dry-run"])
    assert said.exit_code == 1
    assert said.stderr == (
        f"finercut promote: {here.name} version 1 does not take the place of no version: "
        "speed_up is 0.9; at least 1 is required\n"
    )
    assert "| speed_up " in said.stdout
    assert "FAILED" in said.stdout
    said = CliRunner().invoke(main, ["promote", "--version", "7"])
    assert said.exit_code == 1
    assert said.stderr.startswith(f"finercut promote: cannot find models:/{here.name}/7 in MLflow at http://127.0.0.1:")
    assert said.stderr.count("\n") == 1
    said = CliRunner().invoke(main, ["rollback", "nobody"])
    assert said.stderr.startswith("finercut rollback: cannot find nobody in MLflow at ")


def test_status_tells_champion_history_and_what_each_version_lacks(here):
    here.register()
    promoted(here, reason="first")
    here.register(evaluate=retained(0.7))
    here.register(evaluate=retained(0.9))
    here.run.log_tags({"gate": "refused", "gate.reason": "speed_up is 0.9"})
    here.client.log_param(here.run.run_id, "register.name", here.name)
    others = here.client.create_run(here.run.experiment_id)
    here.client.log_param(others.info.run_id, "register.name", f"{here.name}-other")
    here.client.set_tag(others.info.run_id, "gate", "refused")
    said = status.text(here.params, here.name)
    assert f"# {here.name}\n" in said
    assert ": first\n" in said
    rows = {line.split("|")[1].strip(): line for line in reversed(said.splitlines()) if line.startswith("| ")}
    assert "champion" in rows["1"]
    assert "passes the gate" in rows["1"]
    assert "fails: retention is 0.7 over 1 common tasks; at least 0.74 is required" in rows["2"]
    assert "challenger" in rows["3"]
    assert "passes the gate and the comparison" in rows["3"]
    assert f"run {here.run.run_id}: speed_up is 0.9" in said
    assert others.info.run_id not in said
    assert CliRunner().invoke(main, ["status"]).output == said + "\n"


def test_evidence_that_cannot_be_read_is_told_and_stops_nothing_else(here):
    here.register(fetch={"sha256": None})
    here.register()
    assert "evidence/fetch.json of version 1 has no valid sha256" in status.text(here.params, here.name)
    with pytest.raises(ValueError, match=r"evidence/fetch\.json of version 1 has no valid sha256"):
        promoted(here, "1")
