"""The page about one execution shows the figures of its reports, and says what is missing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import example_reports
import pytest
from click.testing import CliRunner

from finercut.evaluation.records import Sample, Score, SublayerFigures
from finercut.registry import runs
from finercut.report import inputs, page
from finercut.report.frontier import FrontierReport, Point
from finercut.serving.records import Spread
from pipelines import pages, paths
from pipelines.cli import main

ROOT = Path(__file__).parents[1]
STAGES = (
    "fetch",
    "calibrate",
    "prove_whole",
    "evaluate_whole",
    "search",
    "prune",
    "heal",
    "quantise",
    "prove",
    "evaluate",
    "throughput",
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A workspace with the reports of an execution, and the current directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", paths.PARAMS)
    for stage in STAGES:
        getattr(example_reports, stage)().write(paths.report(stage))
    return tmp_path


def shown() -> str:
    pages.write(None, paths.PAGE)
    return paths.PAGE.read_text(encoding="utf-8")


def test_the_page_has_the_figures_of_the_reports_and_asks_for_no_file(project):
    text = shown()
    assert "toy: 2 of 8 sublayers removed" in text
    assert '<td data-value="1000">1,000</td><td data-value="800">800</td><td' in text
    assert ">-20.0\N{NO-BREAK SPACE}%</td>" in text
    assert "speed x 1.25" in text
    assert "75.0\N{NO-BREAK SPACE}% ± 0.0" in text
    assert re.findall(r'class="gone" title="([^"]*)"', text) == [
        "2.attention: removed at step 1",
        "3.mlp: removed at step 2",
    ]
    assert not re.search(r'(?:src|href)="(?!#)|url\((?!#)|https?://', text)


def test_the_gate_is_judged_by_the_limits_of_the_executions_own_params(project):
    assert "FAILED" not in shown()
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(re.sub(r"min_speed_up: \S+", "min_speed_up: 1.5", text))
    assert "FAILED</span>: speed_up is 1.25; at least 1.5 is required" in shown()


def test_a_healed_model_has_a_column_of_its_own(project):
    assert "<th>healed</th>" not in shown()
    healed = example_reports.heal().model_copy(
        update={"method": "refit", "perplexity_before": 15.0, "perplexity_after": 12.0}
    )
    healed.write(paths.report("heal"))
    text = shown()
    assert "<th>whole</th><th>pruned</th><th>healed</th>" in text
    assert 'data-value="15.0">15.00</td><td data-value="12.0">12.00</td>' in text


def test_what_was_measured_of_the_pruned_model_and_under_other_loads_is_shown(project):
    example_reports.heal().model_copy(update={"method": "refit"}).write(paths.report("heal"))
    score = Score(value=0.5, stderr=0.01, n_samples=100, n_available=100, n_fewshot=0, higher_is_better=True)
    unhealed = example_reports.evaluate_whole().model_copy(
        update={"perplexity": 17.0, "tasks": {"finercut_copying": score}}
    )
    example_reports.evaluate(unhealed=unhealed).write(paths.report("evaluate"))
    served = example_reports.throughput().whole
    rate = Spread(median=1.125, low=1.1, high=1.15)
    load = {"input_tokens": 512, "output_tokens": 8, "concurrency": 1, "whole": served, "pruned": served}
    example_reports.throughput(more_loads=[{**load, "speed_up": 1.125, "speed_up_spread": rate}]).write(
        paths.report("throughput")
    )
    text = shown()
    assert '<td data-value="10.0">10.00</td><td data-value="17.0">17.00</td><td data-value="15.0">15.00</td>' in text
    assert '<td data-value="0.5">0.500\N{NO-BREAK SPACE}± 0.010</td><td data-value="0.6">0.600</td>' in text
    assert '<td data-value="512">512</td>' in text
    assert "x 1.12 [1.10, 1.15]" in text
    assert "<svg" in text
    assert shown() == text, "the same figures are the same bytes"


def sample(prompt: str, text: str, repetition: float) -> Sample:
    return Sample(prompt=prompt, text=text, n_tokens=8, repetition=repetition)


def test_what_whole_pruned_and_healed_write_stands_side_by_side(project):
    assert "What it writes" not in shown()
    example_reports.heal().model_copy(update={"method": "refit"}).write(paths.report("heal"))
    whole = example_reports.evaluate_whole()
    whole.model_copy(update={"samples": (sample("Once", "upon a time", 0.0), sample("Why", "so", 0.1))}).write(
        paths.report("evaluate_whole")
    )
    unhealed = whole.model_copy(update={"samples": (sample("Once", "a <b> a", 0.5),)})
    final = (sample("Once", "more", 0.25),)
    example_reports.evaluate(unhealed=unhealed, samples=final).write(paths.report("evaluate"))
    text = shown()
    beside = re.findall(r"<div><b>(\w+)</b>, ([\d.]+)\N{NO-BREAK SPACE}% repeated<p>(.*?)</p>", text)
    assert beside == [
        ("whole", "0.0", "upon a time"),
        ("pruned", "50.0", "a &lt;b&gt; a"),
        ("healed", "25.0", "more"),
    ]
    assert "whole 5.0\N{NO-BREAK SPACE}%, pruned 50.0\N{NO-BREAK SPACE}%, healed 25.0\N{NO-BREAK SPACE}%" in text


def test_the_map_of_redundancy_has_the_figures_of_each_sublayer(project):
    looked_at = [
        SublayerFigures(sublayer="2.attention", alone=0.01, contribution=0.1, heads=(0.01, 0.09), peak=4.0),
        SublayerFigures(sublayer="2.mlp", alone=0.1, contribution=0.2, peak=8.0),
        SublayerFigures(sublayer="3.mlp", alone=1.0, contribution=0.4, peak=None),
    ]
    example_reports.evaluate_whole().model_copy(update={"sublayers": tuple(looked_at)}).write(
        paths.report("evaluate_whole")
    )
    rows = re.findall(r"<tr><th>([\w, ]+)</th>(.*?)</tr>", shown().partition('class="heat"')[2])
    cells = {name: re.findall(r"<td>(?:<b[^>]*?(--share: [\d.]+)?\"?>([^<]*)</b>)?</td>", row) for name, row in rows}
    # four blocks, of which two were looked at; 0.1 is half way between 0.01 and 1 by its logarithm
    assert cells["removed alone, attention"] == [("", "")] * 2 + [("--share: 0.000", "×"), ("", "")]
    assert cells["removed alone, mlp"][2:] == [("--share: 0.500", ""), ("--share: 1.000", "×")]
    assert cells["outliers, mlp"][2:] == [("--share: 1.000", ""), ("", "×")]
    assert cells["idle heads"][2] == ("--share: 0.500", "1")
    told = re.search('title="(2.attention, removed[^"]*)"', shown())[1].replace("\N{NO-BREAK SPACE}", " ").split("; ")
    assert told == [
        "2.attention, removed",
        "without it alone, divergence 0.01",
        "adds 10.0 % of the stream&#39;s norm",
        "its 2 heads 1.0 % to 9.0 % each, 1 idle",
        "largest activation 4.0 times the root mean square",
    ]


def test_a_frontier_is_shown_on_the_pages_of_its_points_alone(project):
    points = [
        Point(
            amount=amount,
            removed=[],
            shares={"parameters": amount},
            mean_retention=0.9,
            perplexity_ratio=1.5,
            speed_up=1 + amount,
            passed=amount < 0.3,
            reasons=["speed_up is 1"],
            sha256=sha256,
            run_id="0",
        )
        for amount, sha256 in ((0.1, "8" * 64), (0.2, example_reports.quantise().sha256), (0.3, "9" * 64))
    ]
    frontier = FrontierReport(unit="parameters", rule="leanest", points=points, chosen=0.2)
    frontier.write(paths.report("frontier"))
    assert '<td data-value="0.2">0.2</td><td>chosen, this page</td><td data-value="0.2">−20.0' in shown()
    assert shown().count("<svg") == 2  # with the tasks'
    example_reports.quantise().model_copy(update={"sha256": "7" * 64}).write(paths.report("quantise"))
    assert "The frontier" not in shown()


def test_what_others_wrote_is_text_and_no_markup(project):
    example_reports.fetch().model_copy(update={"source": "<script>alert(1)</script>"}).write(paths.report("fetch"))
    assert "<script>alert" not in shown()


def test_an_execution_that_did_not_end_is_one_line(project):
    paths.report("throughput").unlink()
    with pytest.raises(ValueError, match=r"^this workspace has no throughput\.json: a report needs an execution"):
        pages.write(None, paths.PAGE)
    assert not paths.PAGE.exists()


def test_a_version_of_0_1_has_a_page(tmp_path):
    old = ROOT / "tests/fixtures/v0_1/registry"
    for part in ("both", "1"):
        shutil.copytree(old / part / "evidence", tmp_path, dirs_exist_ok=True)
    text = page.html(inputs.read([tmp_path], "version 1"))
    assert "the claim of prune" in text


def test_a_run_has_a_page_once_its_stages_have_ended(mlflow_store, project):
    run = runs.open_run("pages", {}, {}, "tiny")
    whose = f"runs:/{run.run_id}"
    with pytest.raises(ValueError, match=rf"^{whose} has no fetch\.json: a report needs an execution"):
        pages.write(whose, Path("page.html"))
    run.log_reports(map(paths.report, STAGES))
    run.log_file(paths.PARAMS, "pipeline")
    for name in (whose, run.run_id):
        pages.write(name, Path("page.html"))
        assert "toy: 2 of 8 sublayers removed" in Path("page.html").read_text()
    with pytest.raises(RuntimeError, match="cannot find run 0000"):
        pages.write("0" * 32, Path("page.html"))


def test_another_clones_page_is_not_put_in_place_of_this_ones(project):
    for name in ("report", "compare"):
        (project / name).mkdir()
        assert pages.default(name) == paths.REPORTS / f"of-{name}.html"


@pytest.fixture
def two(project):
    """The workspace and another, whose model has a sublayer less and 8-bit weights, is faster and was timed on other
    hardware."""
    other = project / "other"
    shutil.copytree("reports", other / "reports")
    shutil.copy("params.yaml", other)
    pruned = example_reports.prune()
    more = {"removed": [*pruned.removed, "3.attention"], "shares": pruned.shares | {"parameters": 0.25}}
    pruned.model_copy(update=more).write(other / paths.report("prune"))
    task = example_reports.evaluate().tasks["finercut_copying"]
    worse = task.model_copy(update={"pruned": 0.4, "retention": 0.5})
    example_reports.evaluate(tasks={"finercut_copying": worse}, mean_retention=0.5).write(
        other / paths.report("evaluate")
    )
    example_reports.throughput(speed_up=1.5, hardware="another").write(other / paths.report("throughput"))
    smaller = {"method": "rtn", "scheme": "w8a8", "bytes_before": 1600, "bytes_after": 1000}
    example_reports.quantise().model_copy(update=smaller).write(other / paths.report("quantise"))
    return other


def test_two_executions_are_compared_by_the_figures_of_their_reports(two):
    said = CliRunner().invoke(main, ["compare", ".", "other"])
    assert said.exit_code == 0, said.stderr
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.stdout.splitlines() if "|" in line]
    rows = {row[0]: row[1:] for row in told}
    assert rows["parameters saved"] == ["20.0\N{NO-BREAK SPACE}%", "25.0\N{NO-BREAK SPACE}%", "+5.0 points"]
    assert rows["speed-up"] == ["x 1.25", "x 1.50", "+20.0\N{NO-BREAK SPACE}%"]
    assert rows["checkpoint, bytes"] == ["1,600", "1,000", "-37.5\N{NO-BREAK SPACE}%"]
    assert rows["finercut_copying"][1:3] == ["0.600", "0.400"]
    assert rows["finercut_copying"][-1] == "-25.0 ± 0.0 points"
    assert "speed does not compare: other hardware\n" in said.stdout
    page = paths.COMPARISON.read_text(encoding="utf-8")
    assert "by both: 2.attention, 3.mlp" in page
    assert "by other alone: 3.attention" in page
    assert 'data-value="1.5">x 1.50</td>' in page
    assert not re.search(r'(?:src|href)="(?!#)|url\((?!#)|https?://', page)


def test_a_path_that_is_nothing_is_one_line(project):
    said = CliRunner().invoke(main, ["compare", ".", "nowhere"])
    assert said.exit_code == 1
    (line,) = said.stderr.splitlines()
    assert line.startswith("finercut compare: 'nowhere' names no version, run or folder; write models:/NAME@ALIAS")
