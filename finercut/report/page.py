"""The page about one execution: one HTML file that needs no network."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from finercut.evaluation.records import Sample, SublayerFigures, written
from finercut.report import charts
from finercut.report.inputs import Inputs
from finercut.report.prediction import confirmed
from finercut.serving.records import Spread
from finercut.sublayers import KINDS, Sublayer, parse

# A head that adds less than this share of the stream's norm does next to nothing.
IDLE_HEAD = 0.02


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | str | None = None
    """What a column is sorted by: the figure as it was recorded."""


@dataclass(frozen=True)
class Square:
    """One sublayer on the map."""

    step: int | None
    """None where it was kept."""
    told: str


@dataclass(frozen=True)
class Shade:
    """One sublayer in a row of the redundancy map."""

    share: float | None
    """0 for the least of its measure, 1 for the most; None where it was not measured."""
    text: str
    told: str


def html(inputs: Inputs) -> str:
    return render(
        "page.html.jinja",
        inputs=inputs,
        checks=inputs.checks,
        figures=_figures(inputs),
        blocks=removal_map(inputs),
        steps=_steps(inputs),
        tasks=_tasks(inputs),
        loads=_loads(inputs),
        samples=_samples(inputs),
        repetition=_repetition(inputs),
        redundancy=_redundancy(inputs),
        idle_head=IDLE_HEAD,
        points=_points(inputs),
        predictions=confirmed(inputs.prune, inputs.throughput),
        divergence=charts.divergence(inputs),
        scores=charts.scores(inputs),
        frontier=charts.frontier(inputs),
        hashes=_hashes(inputs),
        versions=_versions(inputs),
        settings=json.dumps(inputs.settings, indent=2),
        percent=percent,
    )


def render(template: str, **values: object) -> str:
    environment = Environment(
        loader=PackageLoader("finercut.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def number(value: float | None, digits: int = 3) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:.{digits}f}", value)


def count(value: int) -> Cell:
    return Cell(f"{value:,}", value)


def change(before: Cell, after: Cell) -> Cell:
    """As a share of what it was; a dash where one of the two is no number."""
    if not (isinstance(before.value, int | float) and isinstance(after.value, int | float) and before.value):
        return Cell("–")
    share = after.value / before.value - 1
    return Cell(f"{100 * share:+.1f}\N{NO-BREAK SPACE}%", share)


def spread_cell(spread: Spread, scale: float, digits: int) -> Cell:
    low, median, high = (f"{scale * x:.{digits}f}" for x in (spread.low, spread.median, spread.high))
    return Cell(f"{median} [{low}, {high}]", spread.median)


def _figures(inputs: Inputs) -> list[tuple[str, list[Cell]]]:
    """Rows of whole, pruned, healed where there is one, and what the final checkpoint changes.

    The engines time the final checkpoint alone: where it was healed, the pruned column has no speed.
    """
    prune, evaluate, timed, heal = inputs.prune, inputs.evaluate, inputs.throughput, inputs.heal
    unhealed = evaluate.unhealed

    def row(name: str, whole: Cell, final: Cell, pruned: Cell | None = None) -> tuple[str, list[Cell]]:
        middle = [pruned or Cell("–")] if inputs.healed else []
        return name, [whole, *middle, final, change(whole, final)]

    def timing(name: str, of: Callable[..., Spread], scale: float, digits: int) -> tuple[str, list[Cell]]:
        return row(name, spread_cell(of(timed.whole), scale, digits), spread_cell(of(timed.pruned), scale, digits))

    pruned = {
        "parameters": count(prune.pruned_parameters),
        "kv": count(prune.pruned_kv_bytes_per_token),
    }
    rows = [
        row("parameters", count(prune.whole_parameters), pruned["parameters"], pruned["parameters"]),
        row("checkpoint, bytes", count(prune.whole_bytes), count(inputs.final_bytes), count(prune.pruned_bytes)),
        row("KV cache, bytes a token", count(prune.whole_kv_bytes_per_token), pruned["kv"], pruned["kv"]),
        row("weights in the engine, GiB", number(timed.whole.weights_gib, 2), number(timed.pruned.weights_gib, 2)),
        row("tokens the KV memory holds", count(timed.whole.kv_cache_tokens), count(timed.pruned.kv_cache_tokens)),
        timing("output tokens/s", lambda engine: engine.output_tokens_per_s, 1, 1),
        timing("TTFT, ms", lambda engine: engine.ttft_s, 1000, 1),
        timing("TPOT, ms", lambda engine: engine.tpot_s, 1000, 2),
        row(
            "perplexity, held-out",
            number(evaluate.whole_perplexity, 2),
            number(evaluate.pruned_perplexity, 2),
            number(unhealed and unhealed.perplexity, 2),
        ),
        row(
            "bits a byte, held-out",
            number(evaluate.whole_bits_per_byte),
            number(evaluate.pruned_bits_per_byte),
            number(unhealed and unhealed.bits_per_byte),
        ),
    ]
    if inputs.healed:
        last = inputs.quantise if inputs.quantised else heal
        first = heal if heal and heal.method != "none" else last
        rows += [
            row(
                "perplexity, float32",
                Cell("–"),
                number(last.perplexity_after, 2),
                number(first.perplexity_before, 2),
            ),
            row(
                "js from whole, held-out",
                Cell("0"),
                number(last.divergence_after, 4),
                number(first.divergence_before, 4),
            ),
        ]
    return rows


def removal_map(inputs: Inputs) -> list[dict[str, Square]]:
    """A column a block, from input to output."""
    known = {sublayer: step for step in inputs.steps for sublayer in parse(step.sublayer).sublayers}
    order: dict[Sublayer, int] = {}
    for number, name in enumerate(inputs.prune.removed, 1):
        for sublayer in parse(name).sublayers:
            order[sublayer] = known[sublayer].step if sublayer in known else number

    def square(sublayer: Sublayer) -> Square:
        if sublayer not in order:
            return Square(None, f"{sublayer}: kept")
        told = f"{sublayer}: removed at step {order[sublayer]}"
        if step := known.get(sublayer):
            told += f", divergence {step.divergence:.4g}, held-out {step.held_out_divergence:.4g}"
            nearest = sorted(step.values.items(), key=lambda item: item[1])[:5]
            told += f"; candidates: {', '.join(f'{n} {v:.4g}' for n, v in nearest)}" if nearest else ""
        return Square(order[sublayer], told)

    return [{kind: square(Sublayer(block, kind)) for kind in KINDS} for block in range(inputs.fetch.n_blocks)]


def _steps(inputs: Inputs) -> list[list[Cell]]:
    rows = []
    for step in inputs.steps:
        name, value = step.next_best or ("–", None)
        # With a refit between removals, candidates are measured in another model than `divergence`.
        margin = None if value is None else value - step.values.get(step.sublayer, step.divergence)
        ratio = step.held_out_divergence / step.divergence if step.divergence else None
        rows.append(
            [
                count(step.step),
                Cell(step.sublayer, step.sublayer),
                Cell(f"{step.divergence:.4g}", step.divergence),
                Cell(f"{step.held_out_divergence:.4g}", step.held_out_divergence),
                number(ratio, 2),
                Cell(name, name),
                Cell("–") if margin is None else Cell(f"{margin:.4g}", margin),
            ]
        )
    return rows


def _tasks(inputs: Inputs) -> list[list[Cell]]:
    def score(value: float, stderr: float | None) -> Cell:
        return Cell(f"{value:.3f}" + (f"\N{NO-BREAK SPACE}± {stderr:.3f}" if stderr is not None else ""), value)

    unhealed = inputs.evaluate.unhealed

    def before(name: str) -> list[Cell]:
        found = unhealed and unhealed.tasks.get(name)
        return [score(found.value, found.stderr) if found else Cell("–")] if inputs.healed else []

    rows = [
        [
            Cell(name, name),
            Cell(task.metric, task.metric),
            score(task.whole, task.whole_stderr),
            *before(name),
            score(task.pruned, task.pruned_stderr),
            Cell("–")
            if task.retention is None
            else Cell(f"{percent(task.retention)} ± {100 * task.retention_stderr:.1f}", task.retention),
            Cell(f"{task.n_samples} of {task.n_available}", task.n_samples),
        ]
        for name, task in inputs.evaluate.tasks.items()
    ]
    return sorted(rows, key=lambda row: row[-2].value if isinstance(row[-2].value, float) else math.inf)


def _written(inputs: Inputs) -> dict[str, dict[str, Sample]]:
    return written(inputs.evaluate_whole, inputs.evaluate, inputs.last_step if inputs.healed else "pruned")


def _samples(inputs: Inputs) -> dict[str, list[tuple[str, Sample]]]:
    """By prompt, of each model."""
    found = _written(inputs)
    prompts = [sample.prompt for sample in inputs.evaluate.samples]
    return {
        prompt: [(name, samples[prompt]) for name, samples in found.items() if prompt in samples] for prompt in prompts
    }


def _repetition(inputs: Inputs) -> dict[str, float]:
    """Of each model, the mean over its samples."""
    return {name: statistics.mean(s.repetition for s in found.values()) for name, found in _written(inputs).items()}


def _redundancy(inputs: Inputs) -> dict[str, list[Shade | None]]:
    """Rows of a column a block; None where a block has nothing of the kind."""
    found = inputs.evaluate_whole.sublayers if inputs.evaluate_whole else ()
    if not found:
        return {}
    known = {figures.sublayer: figures for figures in found}
    removed = {str(sublayer) for name in inputs.prune.removed for sublayer in parse(name).sublayers}

    def row(
        kind: str, strength: Callable[[SublayerFigures], float | None], text: Callable[[SublayerFigures], str]
    ) -> list[Shade | None]:
        here = [known.get(str(Sublayer(block, kind))) for block in range(inputs.fetch.n_blocks)]
        return [f and Shade(strength(f), text(f), _told(f, f.sublayer in removed)) for f in here]

    strengths = {
        "removed alone": _strength(lambda f: f.alone, found),
        "adds to the stream": _strength(lambda f: f.contribution, found),
        "outliers": _strength(lambda f: f.peak, found),
    }
    rows = {
        f"{name}, {kind}": row(kind, strength, lambda f: "×" if f.sublayer in removed else "")
        for name, strength in strengths.items()
        for kind in KINDS
    }
    rows["idle heads"] = row(
        "attention", lambda f: 1 - _n_idle(f) / len(f.heads) if f.heads else None, lambda f: str(_n_idle(f) or "")
    )
    return rows


def _n_idle(figures: SublayerFigures) -> int:
    return sum(head < IDLE_HEAD for head in figures.heads)


def _strength(
    of: Callable[[SublayerFigures], float | None], found: Sequence[SublayerFigures]
) -> Callable[[SublayerFigures], float | None]:
    """Where a value lies between the least and the most of all sublayers, by its logarithm."""
    logs = [math.log(value) for figures in found if (value := of(figures) or 0.0) > 0]
    low, range_ = min(logs, default=0.0), max(logs, default=0.0) - min(logs, default=0.0)

    def strength(figures: SublayerFigures) -> float | None:
        value = of(figures)
        if value is None:
            return None
        return (math.log(value) - low) / range_ if value and range_ else 0.0

    return strength


def _told(figures: SublayerFigures, removed: bool) -> str:
    parts = [f"{figures.sublayer}, {'removed' if removed else 'kept'}"]
    if figures.alone is not None:
        parts.append(f"without it alone, divergence {figures.alone:.3g}")
    parts.append(f"adds {percent(figures.contribution)} of the stream's norm")
    if figures.heads:
        parts.append(
            f"its {len(figures.heads)} heads {percent(min(figures.heads))} to {percent(max(figures.heads))} each, "
            f"{_n_idle(figures)} idle"
        )
    if figures.peak is not None:
        parts.append(f"largest activation {figures.peak:.1f} times the root mean square")
    return "; ".join(parts)


def _points(inputs: Inputs) -> list[list[Cell]]:
    """Of the frontier, by amount."""
    if inputs.frontier is None:
        return []
    rows = []
    for point in inputs.frontier.points:
        marks = {
            "chosen": point.amount == inputs.frontier.chosen,
            "this page": point.sha256 == inputs.final_sha256,
        }
        rows.append(
            [
                Cell(f"{point.amount:g}", point.amount),
                Cell(", ".join(name for name, holds in marks.items() if holds)),
                *(Cell(f"−{percent(share)}", share) for share in point.shares.values()),
                Cell(point.measured_and_predicted, point.speed_up),
                Cell(percent(point.mean_retention), point.mean_retention),
                Cell(f"x {point.perplexity_ratio:.2f}", point.perplexity_ratio),
                Cell("passed" if point.passed else "; ".join(point.reasons)),
            ]
        )
    return rows


def _loads(inputs: Inputs) -> list[list[Cell]]:
    """The other loads that the engines served."""
    rows = []
    for load in inputs.throughput.more_loads:
        speed_up = f"x {load.speed_up:.2f} [{load.speed_up_spread.low:.2f}, {load.speed_up_spread.high:.2f}]"
        tokens = [spread_cell(served.output_tokens_per_s, 1, 1) for served in (load.whole, load.pruned)]
        requests = [count(load.n_requests or load.concurrency), count(load.input_tokens), count(load.output_tokens)]
        rows.append([*requests, *tokens, Cell(speed_up, load.speed_up)])
    return rows


def _hashes(inputs: Inputs) -> dict[str, str]:
    return {
        f"whole model, {inputs.fetch.source} at {inputs.fetch.revision}": inputs.fetch.sha256,
        f"calibration tokens, {inputs.calibrate.source}": inputs.calibrate.calibration_sha256,
        "held-out tokens": inputs.calibrate.held_out_sha256,
        "tokenizer": inputs.calibrate.tokenizer_sha256,
        "pruned weights": inputs.prune.sha256,
        "final weights": inputs.final_sha256,
    }


def _versions(inputs: Inputs) -> dict[str, str]:
    found = {
        "engine": inputs.throughput.engine,
        "torch": inputs.throughput.torch_version,
        "transformers": inputs.evaluate.transformers_version,
        "lm-eval": inputs.evaluate.lm_eval_version,
        "hardware": inputs.throughput.hardware,
    }
    return {name: value for name, value in found.items() if value}
