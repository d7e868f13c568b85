"""The page about one execution, in a headless Chromium."""

from __future__ import annotations

import json
import shutil

import browser
import example_reports
import pytest
from test_report import ROOT, STAGES

from finercut.evaluation.records import Sample, SublayerFigures
from finercut.serving.records import Spread
from finercut.sublayers import KINDS
from pipelines import pages, paths

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.found() is None, reason=f"needs a browser: {', '.join(browser.NAMES)}"),
]
# Rows of #figures by their names: the figures of each cell, as they are sorted by.
FIGURES = """Object.fromEntries([...document.querySelectorAll("#figures tbody tr")].map(
    row => [row.cells[0].textContent, [...row.cells].slice(1).map(cell => Number(cell.dataset.value))]))"""
# Of visible text, pixels.
SMALLEST = """Math.min(...[...document.querySelectorAll("body *")]
    .filter(e => e.checkVisibility() && e.innerText?.trim()).map(e => parseFloat(getComputedStyle(e).fontSize)))"""
# Of the text on what is behind it, by WCAG's relative luminance.
CONTRAST = """(() => {
    const light = colour => {
        const most = colour.startsWith("color(srgb") ? 1 : 255;
        const [r, g, b] = colour.match(/[\\d.]+/g).map(x => x / most).map(
            x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratios = [...document.querySelectorAll("h1, h4, p, b, td, th, .passed, .failed, summary")].map(e => {
        let behind = e;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        const [a, b] = [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor].map(light);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
    return Math.min(...ratios);
})()"""


@pytest.fixture(scope="module")
def tab():
    with browser.browser() as page:
        yield page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of the reports, with the page; the gate is not passed."""
    root = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        shutil.copy(ROOT / "params.yaml", paths.PARAMS)
        for stage in STAGES:
            getattr(example_reports, stage)().write(paths.report(stage))
        pruned = example_reports.throughput().pruned
        faster = pruned.model_copy(update={"output_tokens_per_s": Spread(median=123.456, low=120.0, high=125.0)})
        example_reports.throughput(pruned=faster, speed_up=0.9).write(paths.report("throughput"))
        task = example_reports.evaluate().tasks["finercut_copying"]
        tasks = {"finercut_agreement": task.model_copy(update={"retention": 0.9}), "finercut_copying": task}
        samples = (Sample(prompt="Once upon", text="a time " * 30, n_tokens=60, repetition=0.9),)
        example_reports.evaluate(tasks=tasks, samples=samples).write(paths.report("evaluate"))
        looked_at = tuple(
            SublayerFigures(sublayer=f"{block}.{kind}", alone=10.0 ** (block - 3), contribution=0.5, peak=5.0 + block)
            for block in range(4)
            for kind in KINDS
        )
        whole = example_reports.evaluate_whole().model_copy(update={"samples": samples, "sublayers": looked_at})
        whole.write(paths.report("evaluate_whole"))
        pages.write(None, paths.PAGE)
    return root / paths.REPORTS


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1440, False)])
def test_the_page_is_readable_asks_for_nothing_and_has_no_errors(tab, written, width, dark):
    address = (written / paths.PAGE.name).as_uri()
    tab.open(address, width, dark=dark)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(SMALLEST) >= 12
    assert tab.value(CONTRAST) >= 4.5
    assert tab.value("document.querySelector('.failed').textContent") == "FAILED"
    assert (tab.requests, tab.complaints) == ([address], [])
    assert tab.value("getComputedStyle(document.querySelector('svg')).filter !== 'none'") is dark


def test_the_figures_are_those_of_the_reports_and_tables_sort(tab, written):
    tab.open((written / paths.PAGE.name).as_uri(), 1440)
    prune, evaluate, throughput = (
        json.loads((written / f"{name}.json").read_text()) for name in ("prune", "evaluate", "throughput")
    )
    shown = tab.value(FIGURES)
    assert shown["parameters"][:2] == [prune["whole_parameters"], prune["pruned_parameters"]]
    assert shown["output tokens/s"][:2] == [throughput[m]["output_tokens_per_s"]["median"] for m in ("whole", "pruned")]
    assert shown["perplexity, held-out"][:2] == [evaluate["whole_perplexity"], evaluate["pruned_perplexity"]]
    tasks = "[...document.querySelectorAll('table:not(#figures, .heat) tbody tr')].map(row => row.cells[0].textContent)"
    assert tab.value(tasks) == ["finercut_copying", "finercut_agreement"]
    tab.value("[...document.querySelectorAll('th button')].find(b => b.textContent === 'task').click()")
    assert tab.value(tasks) == ["finercut_agreement", "finercut_copying"]
    tab.value("document.querySelector('.map .gone').click()")
    tab.value("document.querySelector('.heat b').click()")
    removed, alone = tab.value("[...document.querySelectorAll('.told')].map(p => p.textContent)")
    assert removed == "2.attention: removed at step 1"
    assert alone.startswith("0.attention, kept; without it alone, divergence 0.001; adds 50.0")
