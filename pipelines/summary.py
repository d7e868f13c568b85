"""The result of an execution, as Markdown that also reads well in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finercut.checkpoint.records import PruneReport
from finercut.evaluation.records import EvaluateReport
from finercut.registry.records import Check, RegisterReport
from finercut.serving.records import ThroughputReport
from finercut.sources.records import FetchReport

from . import paths


def markdown() -> str:
    """From the reports of every stage.

    Raises:
        FileNotFoundError: a stage has not run.
    """
    sections = (_removals(), _quality(), _speed(), _gate())
    return "\n\n".join(sections) + "\n"


def _removals() -> str:
    fetch, prune = FetchReport.read(paths.report("fetch")), PruneReport.read(paths.report("prune"))
    throughput = ThroughputReport.read(paths.report("throughput"))
    shown = table(
        [*(cost.replace("kv_cache", "KV cache") for cost in prune.shares), "output tokens/s"],
        [[*(f"-{_percent(share)}" for share in prune.shares.values()), f"x {throughput.speed_up:.2f}"]],
    )
    return (
        f"# {fetch.source}: {prune.n_removed_sublayers} of {prune.n_sublayers} sublayers removed\n\n"
        f"{', '.join(prune.removed)}\n\n{shown}"
    )


def _quality() -> str:
    report = EvaluateReport.read(paths.report("evaluate"))
    unhealed = report.unhealed

    def row(name: str, metric: str, whole: str, before: str, final: str, retention: str) -> list[str]:
        return [name, metric, whole, *([before] if unhealed else []), final, retention]

    rows = [
        row(
            name,
            task.metric,
            f"{task.whole:.3f}",
            f"{unhealed.tasks[name].value:.3f}" if unhealed else "",
            f"{task.pruned:.3f}",
            _percent(task.retention),
        )
        for name, task in report.tasks.items()
    ]
    perplexities = [report.whole_perplexity, unhealed.perplexity if unhealed else 0.0, report.pruned_perplexity]
    rows += [
        row("mean", "", "", "", "", _percent(report.mean_retention)),
        row("held-out text", "perplexity", *(f"{value:.2f}" for value in perplexities), ""),
    ]
    header = row("task", "metric", "whole", "pruned", "healed" if unhealed else "pruned", "retention")
    return table(header, rows) + f"\n\n{report.note}"


def _speed() -> str:
    report = ThroughputReport.read(paths.report("throughput"))
    rows = [
        [
            name,
            f"{engine.output_tokens_per_s.median:.1f}",
            f"{engine.ttft_s.median * 1000:.1f}",
            f"{engine.tpot_s.median * 1000:.2f}",
            str(engine.kv_cache_tokens),
        ]
        for name, engine in (("whole", report.whole), ("pruned", report.pruned))
    ]
    return table(["model", "output tokens/s", "TTFT ms", "TPOT ms", "KV-cache tokens"], rows) + (
        f"\n\n{report.engine}, {report.dtype}, {report.concurrency} requests of {report.input_tokens} + "
        f"{report.output_tokens} tokens, on {report.hardware}{_more_loads(report)}"
    )


def _more_loads(report: ThroughputReport) -> str:
    if not report.more_loads:
        return ""
    rows = [
        [
            f"{load.concurrency} x ({load.input_tokens} + {load.output_tokens})",
            *(f"{served.output_tokens_per_s.median:.1f}" for served in (load.whole, load.pruned)),
            f"x {load.speed_up:.2f} [{load.speed_up_spread.low:.2f}, {load.speed_up_spread.high:.2f}]",
        ]
        for load in report.more_loads
    ]
    return "\n\n" + table(["requests x (input + output tokens)", "whole tokens/s", "pruned tokens/s", "speed-up"], rows)


def comparison(checks: Sequence[Check]) -> str:
    """A challenger beside the champion."""
    rows = [
        [c.name, _figure(c.value), _figure(c.champion), "passed" if c.passed else "FAILED", c.reason] for c in checks
    ]
    return table(["check", "challenger", "champion", "", "why"], rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _gate() -> str:
    report = RegisterReport.read(paths.report("register"))
    checks = "\n".join(f"- {'passed' if c.passed else 'FAILED'}: {c.reason}" for c in report.checks)
    outcome = f"Gate: {report.status} {report.model_uri or report.name}"
    return f"{outcome}\n\n{checks}\n\nMLflow run {report.run_id} at {report.tracking_uri}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = (" | ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join(f"| {line} |" for line in padded)
