"""Two executions side by side: one HTML file that needs no network, and the same tables for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finercut.registry.promotion import LOAD, PERPLEXITY, SCORES, differing
from finercut.report.inputs import Inputs
from finercut.report.page import Cell, change, count, number, percent, removal_map, render, spread_cell
from finercut.serving.records import Spread
from finercut.system.records import flatten

_NONE = Cell("–")


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Comparison:
    """Of two executions, by the names they are called by."""

    names: tuple[str, str]
    inputs: tuple[Inputs, Inputs]

    @property
    def figures(self) -> Table:
        """Of the final checkpoints; what is relative is so to each one's own whole model."""
        return Table(["figure", *self.names, "change"], list(self._figures()))

    def _figures(self) -> Iterator[list[Cell]]:
        ours, theirs = (x.prune.shares for x in self.inputs)
        for cost in ours | theirs:
            name = f"{cost.replace('kv_cache', 'KV cache')} saved"
            yield _in_points(name, *(_share(shares.get(cost)) for shares in (ours, theirs)))
        yield _row("speed-up", *map(_speed_up, self.inputs))
        yield _in_points("mean retention", *map(_retention, self.inputs))
        yield _row("perplexity, times the whole model's", *(number(x.evaluate.perplexity_ratio) for x in self.inputs))
        yield _row("perplexity, held-out", *(number(x.evaluate.pruned_perplexity, 2) for x in self.inputs))
        yield _row("bits a byte, held-out", *(number(x.evaluate.pruned_bits_per_byte) for x in self.inputs))
        yield _row("parameters", *(count(x.prune.pruned_parameters) for x in self.inputs))
        yield _row("checkpoint, bytes", *(count(x.final_bytes) for x in self.inputs))
        yield _row("KV cache, bytes a token", *(count(x.prune.pruned_kv_bytes_per_token) for x in self.inputs))
        timed = [x.throughput.pruned for x in self.inputs]
        yield _row("weights in the engine, GiB", *(number(engine.weights_gib, 2) for engine in timed))
        yield _row("output tokens/s", *(spread_cell(engine.output_tokens_per_s, 1, 1) for engine in timed))
        yield _row("TTFT, ms", *(spread_cell(engine.ttft_s, 1000, 1) for engine in timed))
        yield _row("TPOT, ms", *(spread_cell(engine.tpot_s, 1000, 2) for engine in timed))

    @property
    def tasks(self) -> Table:
        """Retention in each task that one of them was evaluated on."""
        ours, theirs = (x.evaluate.tasks for x in self.inputs)
        rows = []
        for name in ours | theirs:
            found = [tasks.get(name) for tasks in (ours, theirs)]
            cells = [
                _NONE
                if task is None or task.retention is None
                else Cell(f"{percent(task.retention)} ± {100 * task.retention_stderr:.1f}", task.retention)
                for task in found
            ]
            difference = _NONE
            if all(task is not None and task.retention is not None for task in found):
                points = found[1].retention - found[0].retention
                error = math.hypot(*(task.retention_stderr for task in found))
                difference = Cell(f"{100 * points:+.1f} ± {100 * error:.1f} points", points)
            scores = [Cell("–") if task is None else Cell(f"{task.pruned:.3f}", task.pruned) for task in found]
            metric = next(task.metric for task in found if task is not None)
            rows.append([Cell(name, name), Cell(metric, metric), *scores, *cells, difference])
        a, b = self.names
        return Table(["task", "metric", a, b, f"retention, {a}", f"retention, {b}", "difference"], rows)

    @property
    def settings(self) -> Table:
        """Those of params.yaml that differ."""
        ours, theirs = (flatten(x.settings, ".") for x in self.inputs)
        rows = [
            [Cell(name, name), *(Cell(_plain(side.get(name))) for side in (ours, theirs))]
            for name in ours | theirs
            if ours.get(name) != theirs.get(name)
        ]
        return Table(["setting", *self.names], rows)

    @property
    def removed(self) -> list[tuple[str, list[str]]]:
        """What both removed, and what one alone."""
        a, b = (x.prune.removed for x in self.inputs)
        return [
            ("by both", [name for name in a if name in b]),
            (f"by {self.names[0]} alone", [name for name in a if name not in b]),
            (f"by {self.names[1]} alone", [name for name in b if name not in a]),
        ]

    @property
    def doubts(self) -> list[str]:
        """Which figures do not compare, because they were measured differently: as promotion judges it."""
        a, b = self.inputs
        found = {
            "retention": differing(a.evaluate, b.evaluate, SCORES),
            "perplexity": differing(a.evaluate, b.evaluate, PERPLEXITY),
            "speed": differing(a.throughput, b.throughput, LOAD),
        }
        if a.calibrate.held_out_sha256 != b.calibrate.held_out_sha256:
            found["perplexity"].append("held-out tokens")
        if a.fetch.sha256 != b.fetch.sha256:
            found["every relative figure"] = ["whole models"]
        return [f"{name} does not compare: other {', '.join(others)}" for name, others in found.items() if others]


def html(comparison: Comparison) -> str:
    return render("comparison.html.jinja", comparison=comparison, maps=[removal_map(x) for x in comparison.inputs])


def _row(name: str, a: Cell, b: Cell) -> list[Cell]:
    return [Cell(name, name), a, b, change(a, b)]


def _in_points(name: str, a: Cell, b: Cell) -> list[Cell]:
    """Of shares, whose change as a share of themselves would mislead."""
    if a.value is None or b.value is None:
        return [Cell(name, name), a, b, _NONE]
    return [Cell(name, name), a, b, Cell(f"{100 * (b.value - a.value):+.1f} points", b.value - a.value)]


def _share(share: float | None) -> Cell:
    return Cell(percent(share), share)


def _speed_up(inputs: Inputs) -> Cell:
    found: Spread | None = inputs.throughput.speed_up_spread
    spread = f" [{found.low:.2f}, {found.high:.2f}]" if found else ""
    return Cell(f"x {inputs.throughput.speed_up:.2f}{spread}", inputs.throughput.speed_up)


def _retention(inputs: Inputs) -> Cell:
    mean = inputs.evaluate.mean_retention
    return _NONE if mean is None else Cell(f"{percent(mean)} ± {100 * inputs.evaluate.mean_retention_stderr:.1f}", mean)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
