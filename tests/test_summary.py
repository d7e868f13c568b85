"""The figures of reports as Markdown, for Prefect's and MLflow's pages."""

from __future__ import annotations

import json

from pipelines import summary


def test_a_record_within_a_report_has_tables_of_its_own_and_a_long_text_stands_by_itself(tmp_path):
    path = tmp_path / "evaluate.json"
    note = "Smoke tasks. " * 20
    record = {"perplexity": 12.5, "tasks": {"a": {"value": 0.5}, "b": {"value": 0.25}}}
    samples = [{"prompt": "Once | upon", "text": "`a\n" * 100, "repetition": 0.5}]
    report = {"dtype": "float32", "heads": [0.125, 0.25], "note": note, "unhealed": record, "samples": samples}
    path.write_text(json.dumps(report))
    figures, written, told, title, within, tasks = summary.figures([path]).split("\n\n")
    assert figures.splitlines()[2:] == ["| dtype  | float32     |", "| heads  | 0.125, 0.25 |"]
    assert written.splitlines()[-1] == f"| 0       | Once \\| upon | {'a ' * 40}... | 0.5        |"
    assert (told, title) == (f"note: {note}", "**unhealed**")
    assert within.splitlines()[-1] == "| perplexity | 12.5  |"
    assert tasks.splitlines()[-2:] == ["| a     | 0.5   |", "| b     | 0.25  |"]
