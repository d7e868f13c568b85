"""Register the pruned model in MLflow if its reports pass the gate of `params.yaml`.

Reads the final checkpoint, every report and dvc.lock; writes reports/register.json. Not a stage of DVC, because it
changes the registry. If a version of the same name holds this checkpoint already, that one becomes the challenger.
"""

from __future__ import annotations

import logging
from pathlib import Path

from finercut.checkpoint.records import ProveReport, PruneReport
from finercut.evaluation.records import EvaluateReport
from finercut.registry import gate, runs, server, versions
from finercut.registry.ledger import Ledger
from finercut.registry.records import Check, RegisterReport
from finercut.selection.records import SearchReport
from finercut.serving.records import ThroughputReport
from finercut.sources.records import CalibrateReport, FetchReport
from finercut.system.records import Environment

from . import dag, paths, reports
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
    mlflow_run = runs.open_run(params.flow.experiment, params.model_dump(mode="json", by_alias=True), dag.revision())
    with runs.recorded(mlflow_run):
        for stage in stages:
            mlflow_run.log_reports(stage.reports)
        for path in PIPELINE_FILES:
            mlflow_run.log_file(path, "pipeline")
        return _register(params, checks, stages, mlflow_run)


def judge(params: Params) -> list[Check]:
    """The gate's checks, from the reports."""
    return gate.check(
        evaluate=EvaluateReport.read(paths.report("evaluate")),
        claims=ProveReport.read(paths.report("prove")).claims,
        throughput=ThroughputReport.read(paths.report("throughput")),
        **params.register_.limits,
    )


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
    mlflow_run.log_tags({"gate": "refused" if failed else "passed", "register": report.status})
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
    metrics: dict[str, float] = {}
    for path in written:
        if path.suffix == ".json":
            metrics |= runs.numbers(path)
    logger.info("uploading %s as a version of %s", paths.FINAL, name)
    files, tags = [*written, *PIPELINE_FILES], dag.revision() | _provenance(checks)
    measured_with = Environment.read(paths.ENVIRONMENT).model_dump() if paths.ENVIRONMENT.is_file() else {}
    libraries = {library: found for library, found in measured_with.items() if found}
    return versions.register(mlflow_run, name, paths.FINAL, files, metrics, tags, md5, libraries)


def _provenance(checks: list[Check]) -> dict[str, str]:
    fetch = FetchReport.read(paths.report("fetch"))
    prune = PruneReport.read(paths.report("prune"))
    evaluate = EvaluateReport.read(paths.report("evaluate"))
    throughput = ThroughputReport.read(paths.report("throughput"))
    return {
        "parent": fetch.source,
        "parent.revision": fetch.revision,
        "parent.sha256": fetch.sha256,
        "calibration.sha256": CalibrateReport.read(paths.report("calibrate")).calibration_sha256,
        "divergence": SearchReport.read(paths.report("search")).divergence,
        "pruned.sha256": prune.sha256,
        "removals": ", ".join(prune.removed),
        **{f"share.{cost}": f"{share:.4f}" for cost, share in prune.shares.items()},
        "mean_retention": str(evaluate.mean_retention),
        "perplexity_ratio": f"{evaluate.perplexity_ratio:.4f}",
        "speed_up": f"{throughput.speed_up:.4f}",
        "gate": "passed",
        "gate.checks": "; ".join(c.reason for c in checks),
    }
