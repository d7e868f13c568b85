"""The result of an execution, as Markdown that also reads well in a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from finercut.checkpoint.records import PruneReport, QuantiseReport
from finercut.evaluation.records import EvaluateReport, Measured, Sample, written
from finercut.registry.records import Check, RegisterReport
from finercut.report.prediction import confirmed
from finercut.serving.records import ThroughputReport
from finercut.serving.timing import shown
from finercut.sources.records import FetchReport
from finercut.system.records import flatten

from . import paths
from .params import Params

# Characters in a cell of a table, and in one of three beside each other.
_CELL, _SAMPLE = 120, 60


def markdown() -> str:
    """From the reports of every stage.

    Raises:
        FileNotFoundError: a stage has not run.
    """
    sections = [_removals(), _quality(), _speed()]  # by what comes first, a missing stage is named
    report = RegisterReport.read(paths.report("register"))
    outcome = f"Gate: {report.status} {report.model_uri or report.name}"
    where = f"MLflow run {report.run_id} at {report.tracking_uri}"
    return "\n\n".join([*sections, outcome, _checks(report.checks), where]) + "\n"


def result(checks: Sequence[Check]) -> str:
    """The same before anything is registered, for MLflow, which shows the first lines and leaves no space in tables."""
    passed = all(check.passed for check in checks)
    gate = f"Gate: {'passed' if passed else 'not passed'}\n\n{_checks(checks)}"
    return "\n\n".join([f"**{_title()}**: {in_short()}", _removed(), gate, _quality(), _speed()])


def plan(params: Params) -> str:
    """What an execution is going to do, in one sentence."""
    search, heal, quantise = params.search, params.heal, params.quantise
    healing = "heals nothing" if heal.method == "none" else f"heals by {heal.method}"
    if quantise.method != "none":
        healing += f", quantises to {quantise.scheme}"
    return (
        f"makes {params.title}, chosen by {search.method} ({search.divergence}), and {healing}. The figures come when "
        "all stages have ended."
    )


def figures(reports: Iterable[Path]) -> str:
    """What the JSON files among them say, as tables; empty where there is none."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in reports if path.suffix == ".json"]
    return "\n\n".join(_tables(report) for report in read if report)


def _tables(report: Mapping[str, object]) -> str:
    """One of what has a single value, and one of each list or mapping of records; long texts by themselves."""
    single, several, within, texts = {}, {}, {}, []
    for name, value in report.items():
        records = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list) else {}
        if records and all(isinstance(record, Mapping) for record in records.values()):
            several[name] = {str(key): flatten(record, " ") for key, record in records.items()}
        elif isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
            within[name] = value
        elif isinstance(value, str) and len(value) > _CELL:
            texts.append(f"{name}: {value}")
        else:
            single |= {key: leaf for key, leaf in flatten({name: value}, " ").items() if leaf not in (None, [], "")}
    found = [table(["figure", "value"], [[name, _cell(value)] for name, value in single.items()])] if single else []
    for name, records in several.items():
        columns = list(dict.fromkeys(column for record in records.values() for column in record))
        rows = [[key, *(_cell(record.get(column)) for column in columns)] for key, record in records.items()]
        found.append(table([name, *columns], rows))
    return "\n\n".join([*found, *texts, *(f"**{name}**\n\n{_tables(record)}" for name, record in within.items())])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    text = "" if value is None else str(value)
    if len(text) > _CELL:
        text = f"{text[:_CELL]}..."
    return text.replace("`", "").replace("|", "\\|").replace("\n", " ")


def in_short() -> str:
    """What is saved, and what of speed and quality is left, as a list in a sentence."""
    return ", ".join(f"{name} {value}" for name, value in _deciding().items())


def _deciding() -> dict[str, str]:
    prune = PruneReport.read(paths.report("prune"))
    evaluate = EvaluateReport.read(paths.report("evaluate"))
    throughput = ThroughputReport.read(paths.report("throughput"))
    return {
        **{cost.replace("kv_cache", "KV cache"): f"-{_percent(share)}" for cost, share in prune.shares.items()},
        "output tokens/s": f"x {throughput.speed_up:.2f}",
        "mean retention": _percent(evaluate.mean_retention),
        "perplexity": f"x {evaluate.perplexity_ratio:.2f}",
    }


def samples() -> str:
    """The beginnings of what each model writes, and how much of it repeats; empty where nothing was written."""
    report = EvaluateReport.read(paths.report("evaluate"))
    by_model = written(
        Measured.read(paths.report("evaluate_whole")), report, _last_step() if report.unhealed else "pruned"
    )

    def told(sample: Sample | None) -> str:
        if sample is None:
            return ""
        return _cell(f"{' '.join(sample.text.split())[:_SAMPLE]} ({_percent(sample.repetition)} repeated)")

    rows = [
        [_cell(prompt[:_SAMPLE]), *(told(found.get(prompt)) for found in by_model.values())]
        for prompt in by_model.get("whole", ())
    ]
    return f"## What it writes\n\n{table(['prompt', *by_model], rows)}" if rows else ""


def _removals() -> str:
    title, deciding = _title(), _deciding()
    return f"# {title}\n\n{_removed()}\n\n{table(list(deciding), [list(deciding.values())])}"


def _title() -> str:
    fetch, prune = FetchReport.read(paths.report("fetch")), PruneReport.read(paths.report("prune"))
    return f"{fetch.model}: {prune.n_removed_sublayers} of {prune.n_sublayers} sublayers removed"


def _removed() -> str:
    return ", ".join(PruneReport.read(paths.report("prune")).removed)


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
    header = row("task", "metric", "whole", "pruned", _last_step() if unhealed else "pruned", "retention")
    return table(header, rows) + f"\n\n{report.note}"


def _last_step() -> str:
    quantised = paths.report("quantise").is_file() and QuantiseReport.read(paths.report("quantise")).method != "none"
    return "quantised" if quantised else "healed"


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
    spread = report.speed_up_spread
    bounds = f" [{spread.low:.2f}, {spread.high:.2f}]" if spread else ""
    return table(["model", "output tokens/s", "TTFT ms", "TPOT ms", "KV-cache tokens"], rows) + (
        f"\n\nspeed-up x {report.speed_up:.2f}{bounds}; {report.engine}, {report.dtype}, {shown(report)}, on "
        f"{report.hardware}{_predictions(report)}{_more_loads(report)}"
    )


def _predictions(report: ThroughputReport) -> str:
    return "".join(f"\n\n{line}" for line in confirmed(PruneReport.read(paths.report("prune")), report))


def _more_loads(report: ThroughputReport) -> str:
    if not report.more_loads:
        return ""
    rows = [
        [
            shown(load),
            *(f"{served.output_tokens_per_s.median:.1f}" for served in (load.whole, load.pruned)),
            *(f"{1000 * served.ttft_s.median:.1f}" for served in (load.whole, load.pruned)),
            *(f"{1000 * served.tpot_s.median:.2f}" for served in (load.whole, load.pruned)),
            f"x {load.speed_up:.2f} [{load.speed_up_spread.low:.2f}, {load.speed_up_spread.high:.2f}]",
        ]
        for load in report.more_loads
    ]
    columns = [f"{model} {figure}" for figure in ("tokens/s", "TTFT ms", "TPOT ms") for model in ("whole", "pruned")]
    return "\n\n" + table(["load", *columns, "speed-up"], rows)


def comparison(checks: Sequence[Check]) -> str:
    """A challenger beside the champion."""
    rows = [
        [c.name, _figure(c.value), _figure(c.champion), "passed" if c.passed else "FAILED", c.reason] for c in checks
    ]
    return table(["check", "challenger", "champion", "", "why"], rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _checks(checks: Sequence[Check]) -> str:
    return "\n".join(f"- {'passed' if c.passed else 'FAILED'}: {c.reason}" for c in checks)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = (" | ".join(map(str.ljust, line, widths)) for line in lines)
    return "\n".join(f"| {line} |" for line in padded)
