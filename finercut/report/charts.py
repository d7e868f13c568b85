"""Charts of the page, as SVG that stands in its HTML."""

from __future__ import annotations

import io
import re

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from finercut.report import frontier as points
from finercut.report.inputs import Inputs

_WHOLE, _PRUNED, _HEALED, _HELD_OUT = "#7a7f87", "#c8452f", "#2f6db5", "#e08a1e"
# Inches: as wide as a phone.
_WIDTH = 4.4


def divergence(inputs: Inputs) -> Markup | None:
    """After each removal, on the calibration and on the held-out tokens; None where no step is known."""
    if not inputs.steps:
        return None
    figure = Figure(figsize=(_WIDTH, 2.8), layout="constrained")
    axes = figure.add_subplot()
    numbers = [step.step for step in inputs.steps]
    axes.plot(
        numbers, [step.divergence for step in inputs.steps], "o-", ms=3, color=_HEALED, label="calibration tokens"
    )
    held_out = [step.held_out_divergence for step in inputs.steps]
    axes.plot(numbers, held_out, "s--", ms=3, color=_HELD_OUT, label="held-out tokens")
    axes.set(xlabel="removals", ylabel="divergence", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _svg(figure)


def scores(inputs: Inputs) -> Markup | None:
    """Of each task, a bar a model with its standard error, the worst first; None where there is no task."""
    tasks = dict(sorted(inputs.evaluate.tasks.items(), key=lambda item: item[1].retention or 0.0))
    if not tasks:
        return None
    unhealed = inputs.evaluate.unhealed.tasks if inputs.evaluate.unhealed else {}
    bars = {"whole": (_WHOLE, [(task.whole, task.whole_stderr) for task in tasks.values()])}
    if unhealed:
        found = [unhealed.get(name) for name in tasks]
        bars["pruned"] = (_PRUNED, [(score.value, score.stderr) if score else (0.0, None) for score in found])
    last = (inputs.last_step, _HEALED) if inputs.healed else ("pruned", _PRUNED)
    bars[last[0]] = (last[1], [(task.pruned, task.pruned_stderr) for task in tasks.values()])
    height = 0.8 / len(bars)
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.5 * len(tasks)), layout="constrained")
    axes = figure.add_subplot()
    for row, (name, (colour, values)) in enumerate(bars.items()):
        places = [place + (row - (len(bars) - 1) / 2) * height for place in range(len(tasks))]
        errors = [stderr or 0.0 for _, stderr in values]
        axes.barh(places, [value for value, _ in values], height, xerr=errors, color=colour, ecolor="#555", label=name)
    axes.set_yticks(range(len(tasks)), list(tasks))
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=len(bars), frameon=False)
    return _svg(figure)


def frontier(inputs: Inputs) -> Markup | None:
    """Its points, quality above speed; None where this execution is no point of one."""
    if inputs.frontier is None:
        return None
    figure = Figure(figsize=(_WIDTH, 5.0), layout="constrained")
    points.draw(inputs.frontier, *figure.subplots(2, 1))
    return _svg(figure)


def _svg(figure: Figure) -> Markup:
    """The same bytes for the same figures."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "finercut"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # HTML wants neither what precedes the element nor the addresses of schemas.
    _, element, drawn = text.getvalue().partition("<svg")
    return Markup(element + re.sub(r' xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", drawn, flags=re.DOTALL))
