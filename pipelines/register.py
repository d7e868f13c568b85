"""Register the pruned model in MLflow if its reports pass the gate of `params.yaml`.

Reads the final checkpoint, every report and dvc.lock; writes reports/register.json. Not a stage of DVC, because it
changes the registry. If a version of the same name holds this checkpoint already, that one becomes the challenger.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from finercut.checkpoint.records import ProveReport, PruneReport
from finercut.evaluation.records import EvaluateReport
from finercut.registry import gate, runs, server, versions
from finercut.registry.ledger import Ledger
from finercut.registry.records import Check, RegisterReport
from finercut.report.frontier import containing
from finercut.selection.records import SearchReport
from finercut.serving.records import ThroughputReport
from finercut.sources.records import CalibrateReport, FetchReport
from finercut.system.records import Environment

from . import dag, pages, paths, reports, summary
from .params import Params

logger = logging.getLogger("finercut")

PIPELINE_FILES = (paths.PARAMS, Path("dvc.yaml"), Path("dvc.lock"))


class Refused(RuntimeError):
    """The model did not pass the gate."""


def run(params: Params, mlflow_run: runs.Run | None = None) -> RegisterReport:
    """Register under `mlflow_run`, or under a run of its own.

    Raises:
        FileNotFoundError, ValueError: a report is missing, or cannot be read.
        Refused: the gate was not passed; the report is written and the reasons are in the MLflow run.
        RuntimeError: the files are not those that `dvc.lock` records, or MLflow does not answer.
    """
    checks = judge(params)
    stages = dag.stages()
    unreadable = [stage.name for stage in stages if reports.unreadable(stage.name)]
    if stale := sorted({*dag.stale(), *unreadable}):
        raise RuntimeError(f"not reproduced since something changed: {', '.join(stale)}; run `finercut run`")
    if mlflow_run is not None:
        return _register(params, checks, stages, mlflow_run)
    mlflow_run = open_run(params, {}, "finercut register")
    with runs.recorded(mlflow_run):
        # The gate's limits may be others since.
        pages.write(None, paths.PAGE)
        for stage in stages:
            mlflow_run.log_reports(stage.reports)
        for path in PIPELINE_FILES:
            mlflow_run.log_file(path, "pipeline")
        return _register(params, checks, stages, mlflow_run)


def open_run(params: Params, tags: Mapping[str, str], source: str, title: str | None = None) -> runs.Run:
    """An MLflow run of an execution with these params.

    Args:
        source: the command
        title: None is the params'
    """
    mlflow_run = runs.open_run(
        params.flow.experiment,
        params.model_dump(mode="json", by_alias=True),
        dag.revision() | {"mlflow.source.name": source, "mlflow.source.type": "LOCAL"} | tags,
        params.register_.name,
        title or params.title,
    )
    mlflow_run.describe(f"`{source}`: {summary.plan(params)}")
    return mlflow_run


def judge(params: Params) -> list[Check]:
    """The gate's checks, from the reports."""
    return gate.check(
        evaluate=EvaluateReport.read(paths.report("evaluate")),
        claims=ProveReport.read(paths.report("prove")).claims,
        throughput=ThroughputReport.read(paths.report("throughput")),
        **params.register_.limits,
    )


def conclude(checks: Sequence[Check], mlflow_run: runs.Run) -> None:
    """Say on the run's page what the execution came to: figures that decide, and the gate."""
    mlflow_run.log_metrics(_deciding())
    failed = "; ".join(check.reason for check in checks if not check.passed)
    mlflow_run.log_tags({"gate": "refused", "gate.reason": failed} if failed else {"gate": "passed"})
    mlflow_run.describe(summary.result(checks))


def _register(params: Params, checks: list[Check], stages: list[dag.Stage], mlflow_run: runs.Run) -> RegisterReport:
    name = params.register_.name
    failed = [c.reason for c in checks if not c.passed]
    if failed:
        report = _report("refused", None, checks, name, mlflow_run)
    else:
        md5 = dag.md5(paths.FINAL)
        # The checkpoint of a collected version has been deleted.
        collected = Ledger(mlflow_run.client, name).read().collected
        known = versions.find_version(mlflow_run, name, md5, collected)
        found = known or _new_version(stages, checks, name, md5, mlflow_run)
        versions.challenge(mlflow_run, name, found.version)
        report = _report("already registered" if known else "registered", found, checks, name, mlflow_run)
    report.write(paths.report("register"))
    mlflow_run.log_file(paths.report("register"), "reports")
    mlflow_run.log_tags({"register": report.status})
    conclude(checks, mlflow_run)
    if failed:
        raise Refused(f"{name} is not registered: {'; '.join(failed)}")
    logger.info("%s: %s", report.status, report.model_uri)
    return report


def _report(
    status: str, found: versions.Registered | None, checks: list[Check], name: str, mlflow_run: runs.Run
) -> RegisterReport:
    return RegisterReport(
        status=status,
        passed=all(c.passed for c in checks),
        checks=checks,
        name=name,
        version=found.version if found else None,
        model_uri=found.model_uri if found else None,
        run_id=mlflow_run.run_id,
        tracking_uri=server.without_credentials(server.tracking_uri()),
    )


def _new_version(
    stages: list[dag.Stage], checks: list[Check], name: str, md5: str, mlflow_run: runs.Run
) -> versions.Registered:
    written = [path for stage in stages for path in stage.reports]
    metrics = _deciding()
    for path in written:
        if path.suffix == ".json":
            metrics |= runs.numbers(path)
    if containing(paths.report("frontier"), ProveReport.read(paths.report("prove")).sha256):
        written.append(paths.report("frontier"))  # the version's page shows it
    logger.info("uploading %s as a version of %s", paths.FINAL, name)
    files, tags = [*written, *PIPELINE_FILES], dag.revision() | _provenance(checks)
    measured_with = Environment.read(paths.ENVIRONMENT).model_dump() if paths.ENVIRONMENT.is_file() else {}
    libraries = {library: found for library, found in measured_with.items() if found}
    description = _description(mlflow_run, paths.REMOVALS_PICTURE in written)
    return versions.register(mlflow_run, name, paths.FINAL, files, metrics, tags, md5, libraries, description)


def _description(mlflow_run: runs.Run, with_picture: bool) -> str:
    """The checkpoint's card, between the figures that decide with the picture of what was removed, and samples."""
    found = paths.FINAL / "README.md"
    card = ModelCard(found.read_text(encoding="utf-8"), ignore_metadata_errors=True).text if found.is_file() else ""
    # Relative to the page of MLflow's server that shows it, wherever that is.
    picture = f"get-artifact?path={paths.REMOVALS_PICTURE}&run_uuid={mlflow_run.run_id}"
    parts = [
        summary.in_short(),
        f"![What was removed]({picture})" if with_picture else "",
        # MLflow's lines of a long heading lie upon each other.
        re.sub(r"^# (.*)$", r"**\1**", card.strip(), count=1, flags=re.MULTILINE),
        summary.samples(),
    ]
    return "\n\n".join(part for part in parts if part)


def _deciding() -> dict[str, float]:
    """The figures by which versions are chosen: metrics of the run and of the model, tags of the version."""
    prune = PruneReport.read(paths.report("prune"))
    evaluate = EvaluateReport.read(paths.report("evaluate"))
    retention = {} if evaluate.mean_retention is None else {"mean_retention": evaluate.mean_retention}
    return {
        **{f"share.{cost}": share for cost, share in prune.shares.items()},
        **retention,
        "perplexity_ratio": evaluate.perplexity_ratio,
        "speed_up": ThroughputReport.read(paths.report("throughput")).speed_up,
    }


def _provenance(checks: list[Check]) -> dict[str, str]:
    fetch = FetchReport.read(paths.report("fetch"))
    prune = PruneReport.read(paths.report("prune"))
    return {
        "parent": fetch.source,
        "parent.revision": fetch.revision,
        "parent.sha256": fetch.sha256,
        "calibration.sha256": CalibrateReport.read(paths.report("calibrate")).calibration_sha256,
        "divergence": SearchReport.read(paths.report("search")).divergence,
        "pruned.sha256": prune.sha256,
        "removals": ", ".join(prune.removed),
        # Of one length, because MLflow compares tags as text.
        **{name: f"{value:.4f}" for name, value in _deciding().items()},
        "gate": "passed",
        "gate.checks": "; ".join(c.reason for c in checks),
    }
