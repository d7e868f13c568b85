"""The page about one execution shows the figures of its reports, and says what is missing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import example_reports
import pytest

from finercut.report import inputs, page
from pipelines import pages, paths

ROOT = Path(__file__).parents[1]
STAGES = ("fetch", "calibrate", "search", "prune", "heal", "prove", "evaluate_whole", "evaluate", "throughput")


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
    assert not re.search(r"(?:src|href)=|url\(|https?://", text)


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
    assert '<td data-value="15.0">15.00</td><td data-value="12.0">12.00</td>' in text


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
