"""The whole pipeline as its users run it: real Prefect, DVC, lm-eval, vLLM and MLflow, on a tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from finercut.checkpoint.records import ProveReport, PruneReport
from finercut.evaluation.records import EvaluateReport
from finercut.registry.records import RegisterReport
from finercut.selection.trajectory import read_trajectory
from finercut.serving.records import ThroughputReport
from pipelines import cli_stages, dag, inspection, params, paths, register, summary
from pipelines.cli import main

ROOT = Path(__file__).parents[1]
COPIED = ("finercut", "pipelines", ".dvc", ".dvcignore", ".gitignore", "dvc.yaml", "params.yaml", "pyproject.toml")
# vLLM starts four times, each taking the better part of a minute on two cores.
pytestmark = pytest.mark.timeout(1800)
STAGES = (
    "fetch",
    "calibrate",
    "prove_whole",
    "evaluate_whole",
    "costs",
    "search",
    "prune",
    "heal",
    "quantise",
    "prove",
    "evaluate",
    "throughput",
    "report",
)
NAME = "finercut-tiny"


@dataclass
class Project:
    """A clone of the project, and how to work in it."""

    root: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """What a command in the project's environment prints; fails with its errors."""
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def git(self, *arguments: str) -> str:
        return self.run("git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments)

    def clone(self, root: Path) -> Project:
        self.run("git", "clone", "-q", str(self.root), str(root))
        return Project(root, self.environment)

    def report(self, kind, name):
        return kind.read(self.root / "reports" / f"{name}.json")

    def states(self) -> dict[str, str]:
        """Whether each stage ran or was cached in the newest run."""
        experiment = mlflow.MlflowClient().get_experiment_by_name(NAME)
        tags = mlflow.MlflowClient().search_runs([experiment.experiment_id], max_results=1)[0].data.tags
        return {stage: tags[f"stage.{stage}"] for stage in STAGES}


def tiny_settings(model: Path, text: Path) -> dict:
    """params.yaml with a model, a text and tasks that take seconds, and limits a random model can meet."""
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["fetch"]["source"] = {"kind": "local", "path": str(model)}
    settings["calibrate"] |= {
        "source": {"kind": "files", "paths": [str(text)]},
        "sources": None,
        "unseen": None,
        "n_samples": 4,
        "n_tokens": 32,
        "n_held_out_samples": 4,
        "n_healing_samples": 0,
    }
    settings["search"] |= {"mode": "exact", "per": None, "fill": False, "removals": 0.5, "dtype": "float32"}
    settings["search"]["continuation_tokens"] = 4
    settings["prune"]["budget"] = {"unit": "sublayers", "amount": 0.25}
    settings["heal"] = {"method": "none"}
    settings["evaluate"] |= {
        "tasks": [
            {"name": "finercut_agreement", "metric": "acc", "limit": 20},
            {"name": "finercut_copying", "metric": "exact_match", "limit": 2},
        ],
        "samples": {"prompts": ["The river rises"], "n_tokens": 4},
        "alone_tokens": 8,
    }
    settings["throughput"] |= {
        "input_tokens": 8,
        "output_tokens": 8,
        "concurrency": 2,
        "more_loads": [{"input_tokens": 48, "output_tokens": 2, "concurrency": 3}],
        "n_rounds": 2,
        "max_model_len": 64,
        "kv_cache_gib": 0.1,
        "enforce_eager": True,
    }
    settings["register"] = {"name": NAME, "min_retention": 0.01, "min_speed_up": 0.01, "max_perplexity_ratio": 1000}
    settings["register"]["allow_doubtful_whole"] = True  # the models are random ones
    settings["flow"] |= {"experiment": NAME, "retries": {}}
    return settings


def make_project(root: Path, settings: dict, environment: dict[str, str]) -> Project:
    """A repository with the project's own code and other settings, committed."""
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    for cached in ("cache", "tmp", "config.local"):
        shutil.rmtree(root / ".dvc" / cached, ignore_errors=True)
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    made = Project(root, environment)
    made.git("init", "-q")
    made.git("add", "-A")
    made.git("commit", "-qm", "tiny")
    return made


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model, prefect_server):
    """A clone in which `finercut run` has succeeded, committed with its dvc.lock."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n\n".join(TEXT * 6))
    store = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": store,
        "PREFECT_API_URL": prefect_server,
        # Engines start in half the time; test_serving times one that is divided into processes.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    made = make_project(tmp_path_factory.mktemp("project"), tiny_settings(tiny_model, text), environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        mlflow.set_tracking_uri(store)
        made.run("finercut", "run")
        made.git("add", "-A")
        made.git("commit", "-qm", "ran")
        yield made


def test_a_model_goes_from_fetch_to_a_registered_version(project, monkeypatch):
    assert project.states() == dict.fromkeys(STAGES, "ran")
    pruned, proof = project.report(PruneReport, "prune"), project.report(ProveReport, "prove")
    assert (pruned.n_removed_sublayers, pruned.shares["sublayers"]) == (2, 0.25)
    assert (
        pruned.removed
        == [r.sublayer for r in read_trajectory(project.root / "artifacts/trajectory.jsonl").removals][:2]
    )
    assert [claim.name for claim in proof.claims] == ["prune", "heal", "quantise", "serve_whole", "serve"]
    assert proof.holds
    assert set(project.report(EvaluateReport, "evaluate").tasks) == {"finercut_agreement", "finercut_copying"}
    timed = project.report(ThroughputReport, "throughput")
    assert timed.pruned.output_tokens_per_s.median > 0
    (long,) = timed.more_loads
    assert (long.input_tokens, long.output_tokens, long.concurrency) == (48, 2, 3)
    # A round lasts no shorter than the first tokens of its requests.
    assert 0 < long.pruned.output_tokens_per_s.low < 3 * 2 / long.pruned.ttft_s.low
    monkeypatch.chdir(project.root)
    assert "3 requests of 48 + 2 tokens" in summary.markdown()
    assert project.report(RegisterReport, "register").status == "registered"
    assert (project.root / "reports/removals.png").is_file()
    run_id = project.report(RegisterReport, "register").run_id
    page = mlflow.artifacts.load_text(f"runs:/{run_id}/reports/report.html")
    assert page == (project.root / "reports/report.html").read_text()
    assert "2 of 8 sublayers removed" in page
    assert "<h4>The river rises</h4>" in page
    assert page.count("without it alone") == 3 * 8 + 4  # three measures of all, and the heads of attentions


def test_the_registered_version_can_be_downloaded_and_generates_what_the_checkpoint_does(project):
    directory = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@challenger")) / "checkpoint"

    def generated(path):
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            ids = tokenizer("The river rises", return_tensors="pt")["input_ids"]
            return model.generate(ids, max_new_tokens=8, do_sample=False).tolist()

    assert generated(directory) == generated(project.root / "artifacts/quantised")
    version = mlflow.MlflowClient().get_model_version_by_alias(NAME, "challenger")
    assert "| prompt          | whole" in version.description
    told = inspection.describe(f"models:/{NAME}@challenger")
    assert ", ".join(project.report(PruneReport, "prune").removed) in told


def test_figures_and_curves_show_through_dvc(project):
    assert "reports/throughput.json" in project.run("dvc", "metrics", "show")
    project.run("dvc", "metrics", "diff", "HEAD~1")
    project.run("dvc", "plots", "show", "-q")
    page = (project.root / "dvc_plots/index.html").read_text()
    assert "Divergence after each removal" in page
    shutil.rmtree(project.root / "dvc_plots")


def test_running_again_computes_and_registers_nothing(project, monkeypatch):
    monkeypatch.chdir(project.root)
    assert dag.stale() == []
    paths.PAGE.write_text("by other limits of the gate")
    report = register.run(params.load())
    assert (report.status, report.version) == ("already registered", "1")
    assert "2 of 8 sublayers removed" in paths.PAGE.read_text()


@pytest.mark.parametrize(
    ("section", "change", "stale"),
    [
        ("prune", {"budget": {"unit": "sublayers", "amount": 3}}, ["prune", "search"]),
        ("evaluate", {"seed": 1}, ["evaluate", "evaluate_whole"]),
        ("register", {"min_speed_up": 0.5}, []),
    ],
)
def test_a_change_of_params_concerns_its_own_stage(project, monkeypatch, section, change, stale):
    monkeypatch.chdir(project.root)
    before = Path("params.yaml").read_text()
    settings = yaml.safe_load(before)
    settings[section] |= change
    Path("params.yaml").write_text(yaml.safe_dump(settings))
    try:
        assert dag.stale() == stale
    finally:
        Path("params.yaml").write_text(before)


def test_another_clone_restores_everything_from_the_remote(project, tmp_path, monkeypatch):
    project.run("dvc", "remote", "add", "--default", "--force", "store", str(tmp_path / "remote"))
    project.git("commit", "-qam", "remote")
    project.run("dvc", "push", "-q")
    clone = project.clone(tmp_path / "clone")
    (clone.root / paths.WORK).mkdir()
    shutil.copy(project.root / paths.FORESEEN, clone.root / paths.WORK)  # what vLLM answered about this model
    monkeypatch.chdir(clone.root)
    done = CliRunner().invoke(main, ["run", "--pull"])
    assert done.exit_code == 0, done.output
    assert clone.states() == dict.fromkeys(STAGES, "cached") | {"report": "ran"}
    weights = Path("artifacts/quantised/model.safetensors")
    assert (clone.root / weights).read_bytes() == (project.root / weights).read_bytes()


def test_from_scratch_everything_up_to_the_checkpoint_is_the_same_bytes(project, tmp_path, monkeypatch, without_vllm):
    clone = project.clone(tmp_path / "clone")
    monkeypatch.chdir(clone.root)
    for stage in ("fetch", "calibrate", "costs", "search", "prune"):
        cli_stages.runner(stage)(params.load())
    for artifact in ("calibration", "trajectory.jsonl", "pruned"):
        assert (
            subprocess.run(
                ["diff", "-r", project.root / "artifacts" / artifact, clone.root / "artifacts" / artifact], check=False
            ).returncode
            == 0
        )
