"""Registered versions of a real pruned checkpoint, with evidence as the pipeline writes it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import example_reports
import yaml

from finercut.model.tensors import weights_sha256
from finercut.registry import runs, versions
from pipelines import paths
from pipelines.params import Params
from pipelines.recheck import directory_md5

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Project:
    """The current directory, holding a whole and a pruned model, and a registered model named after the test."""

    params: Params
    run: runs.Run

    @property
    def name(self) -> str:
        return self.params.register_.name

    @property
    def client(self):
        return self.run.client

    def register(self, checkpoint: Path = paths.FINAL, *, evaluate=None, throughput=None, claim=None, **reports) -> str:
        """A version of `checkpoint`, the challenger; its number.

        Args:
            evaluate, throughput, claim: changes of the reports, and of the one claim
            reports: changes of others, by stage
        """
        folder = Path("evidence")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy("params.yaml", folder)
        changed = {
            "fetch": {"sha256": weights_sha256(paths.MODEL)},
            "prune": {"sha256": weights_sha256(checkpoint)},
        } | reports
        for stage in ("fetch", "prune", "calibrate", "search"):
            report = getattr(example_reports, stage)().model_copy(update=changed.get(stage, {}))
            report.write(folder / f"{stage}.json")
        example_reports.evaluate(**evaluate or {}).write(folder / "evaluate.json")
        example_reports.throughput(**throughput or {}).write(folder / "throughput.json")
        example_reports.prove(claims=[example_reports.claim(**claim or {})], sha256=changed["prune"]["sha256"]).write(
            folder / "prove.json"
        )
        md5 = directory_md5(checkpoint)
        evidence = sorted(folder.iterdir())
        version = versions.register(self.run, self.name, checkpoint, evidence, {"a": 1.0}, {}, md5).version
        versions.challenge(self.run, self.name, version)
        return version

    def aliases(self) -> dict[str, str]:
        return {a: str(v) for a, v in self.client.get_registered_model(self.name).aliases.items()}

    def tags(self, version: str) -> dict[str, str]:
        return self.client.get_model_version(self.name, version).tags


def task(retention: float, **changes):
    """A task's result with this retention."""
    whole = example_reports.evaluate().tasks["finercut_copying"]
    return whole.model_copy(update={"retention": retention} | changes)


def retained(retention: float, **changes) -> dict:
    """Changes of the evaluate report: one task, retained so far."""
    return {"mean_retention": retention, "tasks": {"finercut_copying": task(retention)}} | changes


def project(directory: Path, whole: Path, pruned: Path, **promote) -> Project:
    """Fill `directory`, the current one; MLFLOW_TRACKING_URI says where versions go."""
    for source, target in ((whole, paths.MODEL), (pruned, paths.FINAL)):
        shutil.copytree(source, directory / target)
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["register"] |= {"name": directory.name, "min_retention": 0.6, "max_perplexity_ratio": 1.7}
    settings["flow"]["experiment"] = directory.name
    settings["fetch"]["source"] = {"kind": "local", "path": str(whole)}
    settings["prove"]["device"] = "cpu"
    settings["promote"] |= promote
    (directory / "params.yaml").write_text(yaml.safe_dump(settings))
    return Project(Params.model_validate(settings), runs.open_run(directory.name, {}, {}, "tiny"))
