"""Pictures of a selection: which sublayers are removed, and the divergence after each removal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from finercut.selection.selection import Selection
from finercut.selection.trajectory import Trajectory
from finercut.sublayers import KINDS, Sublayer, parse
from finercut.system.staging import staged_file

_KEPT, _REMOVED = "#d7dee6", "#c8452f"
_CALIBRATION, _HELD_OUT = "#2f6db5", "#e08a1e"
_METHODS = ("#7a7f87", "#2b2b2b", "#2f6db5", "#e08a1e", "#c8452f")


def removal_map(selection: Selection, n_blocks: int, path: Path, title: str) -> None:
    """The model from input (left) to output, one column a block, removed sublayers in red with their step."""
    steps = {s: n for n, chosen in enumerate(selection.removals, 1) for s in parse(chosen.candidate).sublayers}
    figure = Figure(figsize=(max(6.0, 0.32 * n_blocks + 1.6), 2.4), layout="constrained")
    axes = figure.add_subplot()
    for row, kind in enumerate(KINDS):
        for block in range(n_blocks):
            step = steps.get(Sublayer(block, kind))
            axes.add_patch(_cell(block, row, _KEPT if step is None else _REMOVED))
            if step is not None:
                axes.text(block, row, str(step), ha="center", va="center", color="white", fontsize=8)
    axes.set(xlim=(-0.6, n_blocks - 0.4), ylim=(1.6, -0.6), xlabel="block", yticks=[0, 1], yticklabels=KINDS)
    axes.set_title(title, parse_math=False)  # it names a file, which can have dollars in it
    axes.set_xticks(range(0, n_blocks, max(1, n_blocks // 15)))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.legend(
        handles=[Patch(color=_REMOVED, label="removed (number: step)"), Patch(color=_KEPT, label="kept")],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    _save(figure, path, dpi=75)  # MLflow shows it as large as it is, and cuts off what its page has no room for


def divergence_curves(trajectory: Trajectory, path: Path) -> None:
    """Divergence from the whole model after each removal, on the calibration and on the held-out tokens."""
    removals = trajectory.removals
    steps = [r.step for r in removals]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [r.divergence for r in removals], "o-", ms=4, color=_CALIBRATION, label="calibration tokens")
    axes.plot(steps, [r.held_out_divergence for r in removals], "s--", ms=4, color=_HELD_OUT, label="held-out tokens")
    axes.set(xlabel="removals", ylabel=f"{trajectory.provenance.divergence} divergence", ylim=(0, None))
    axes.set_xticks(steps, [f"{r.step}\n{r.sublayer}" for r in removals] if len(steps) <= 20 else None)
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def cost_curves(growth: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], path: Path) -> None:
    """Seconds of CPU that a search takes as one dimension of the model grows: a panel each, a line a method."""
    figure = Figure(figsize=(3.1 * len(growth), 3.6), layout="constrained")
    for axes, (name, methods) in zip(figure.subplots(1, len(growth), sharey=True), growth.items(), strict=True):
        for (method, points), marker, colour in zip(methods.items(), "osv^D", _METHODS, strict=False):
            axes.plot(*zip(*points, strict=True), marker=marker, ms=4, color=colour, label=method)
        axes.set(xlabel=name.replace("n_", "").replace("_", " "), xscale="log", yscale="log")
        axes.set_xticks(sorted({size for points in methods.values() for size, _ in points}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("CPU seconds a search")
    figure.axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _cell(block: int, row: int, colour: str) -> Patch:
    return FancyBboxPatch(
        (block - 0.38, row - 0.34), 0.76, 0.68, boxstyle="round,pad=0,rounding_size=0.12", color=colour
    )


def _save(figure: Figure, path: Path, dpi: int = 150) -> None:
    with staged_file(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")
