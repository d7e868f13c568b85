"""The command as its users meet it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from click.testing import CliRunner

from pipelines import settings
from pipelines.cli import main
from pipelines.params import Params

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "mlflow", "prefect", "dvc", "vllm", "lm_eval", "numpy", "pydantic", "matplotlib")


def finercut(*arguments, cwd, **options):
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with nothing but params.yaml, and the current one."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_help_teaches_and_imports_nothing_heavy():
    code = (
        "import json, sys\nfrom click.testing import CliRunner\nfrom pipelines.cli import main\n"
        "said = {name: CliRunner().invoke(main, [*name.split(), '--help']).output for name in ['', *main.commands]}\n"
        f"print(json.dumps([said, [name for name in {HEAVY} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    said, heavy = json.loads(done.stdout)
    assert heavy == []
    assert {"", "fetch", "run", "watch"} < said.keys()
    for command, text in said.items():
        assert "Usage" in text, command
        assert len(text.splitlines()) > 5, command


def test_commands_that_compare_and_register_figures_import_no_torch():
    code = (
        "import sys\nfrom pipelines import collect, promote, register, status\n"
        "print([name for name in ('torch', 'transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_error_is_one_line_that_names_the_stage_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    said = finercut("fetch", cwd=tmp_path)
    assert said.returncode == 1
    assert said.stderr == ("finercut fetch: no params file at params.yaml; run from the project's root, or name one\n")
    assert "Traceback" in finercut("--traceback", "fetch", cwd=tmp_path).stderr


class Unforeseen(Exception):
    """As tokenizers and datasets raise: neither a ValueError nor another kind that says what it is about."""


@pytest.mark.parametrize("error", [Unforeseen("no such\nthing"), IndexError("index 7"), KeyError("x"), MemoryError()])
def test_no_error_is_shown_as_a_traceback_but_where_it_was_raised_is_kept(error, project, monkeypatch):
    monkeypatch.setattr("pipelines.summary.markdown", lambda: _raise(error))
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    error.add_note("with correct-horse-battery")
    said = CliRunner().invoke(main, ["summary"])
    assert said.exit_code == 1
    (line,) = said.stderr.splitlines()
    assert line.startswith(f"finercut summary: unexpected {type(error).__name__}: {' '.join(str(error).split())}")
    assert line.endswith("; .finercut/traceback.txt says where")
    kept = Path(".finercut/traceback.txt").read_text()
    assert "in _raise" in kept
    assert "correct-horse-battery" not in kept
    assert CliRunner().invoke(main, ["--traceback", "summary"]).exception is error


def test_what_fails_while_an_interrupt_is_dealt_with_is_no_error_of_its_own(project, monkeypatch):
    def interrupted():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise Unforeseen("the server that a flow would tell of its end is gone") from None

    monkeypatch.setattr("pipelines.summary.markdown", interrupted)
    said = CliRunner().invoke(main, ["summary"])
    assert (said.exit_code, said.stderr) == (1, "Aborted!\n")
    assert not Path(".finercut").exists()


def test_what_a_library_lacks_is_said_in_its_own_words(project, monkeypatch):
    lacking = ImportError("FlashAttention2 has been toggled on, but it is not installed")
    monkeypatch.setattr("pipelines.summary.markdown", lambda: _raise(lacking))
    said = CliRunner().invoke(main, ["summary"])
    assert said.stderr == f"finercut summary: {lacking}\n"


def _raise(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["prune", "--quick"], "finercut prune: No such option '--quick'; see `finercut prune --help`\n"),
        (["prune", "more"], "finercut prune: Got unexpected extra argument (more); see `finercut prune --help`\n"),
        (["frontier"], "finercut frontier: Missing option '--budgets'; see `finercut frontier --help`\n"),
        (["no-such"], "finercut: No such command 'no-such'; see `finercut --help`\n"),
        (["--no-such"], "finercut: No such option '--no-such'; see `finercut --help`\n"),
    ],
)
def test_what_is_no_option_or_argument_is_one_line(given, said):
    found = CliRunner().invoke(main, given)
    assert (found.exit_code, found.stderr) == (2, said)


@pytest.mark.parametrize("budgets", ["", "10%,20%", "0.1;0.2", "0.1,", "nan", "inf"])
def test_budgets_that_are_no_numbers_are_one_line(project, budgets):
    said = CliRunner().invoke(main, ["frontier", "--budgets", budgets])
    assert said.exit_code == 1
    assert said.stderr == (
        f"finercut frontier: --budgets takes numbers joined by commas, such as 0.1,0.2, got {budgets!r}\n"
    )


@pytest.mark.parametrize(
    ("amounts", "unit", "said"),
    [
        ([0.1, 0.0], "parameters", "budget 0 parameters: .*greater than 0"),
        ([0.1, 0.1], "parameters", "name one twice"),
        ([8.0, 12.0], "kv_cache", "budget 8 kv_cache: a budget in kv_cache is a share between 0 and 1"),
        ([8.0, 8.5], "sublayers", "budget 8.5 sublayers: a budget in sublayers is a number of them or a share"),
        ([1.2, 0.9], "speed_up", "budget 0.9 speed_up: a budget in speed_up is above 1"),
    ],
)
def test_budgets_are_checked_before_anything_starts(amounts, unit, said):
    with pytest.raises(ValueError, match=said):
        settings.check_budgets(amounts, unit)


def test_a_unit_that_does_not_go_with_the_search_is_told_before_anything_starts(project, monkeypatch):
    monkeypatch.setattr("pipelines.cli._prepare_prefect", lambda: _raise(RuntimeError("too late")))
    text = (
        Path("params.yaml")
        .read_text()
        .replace("  per: parameters ", "  per: time ")
        .replace("unit: parameters", "unit: speed_up")
        .replace("amount: 0.138", "amount: 1.2")
    )
    Path("params.yaml").write_text(text)
    said = CliRunner().invoke(main, ["frontier", "--budgets", "0.1", "--unit", "parameters"])
    (line,) = said.stderr.splitlines()
    assert "search.per = time goes with a prune.budget in" in line


def test_from_another_folder_a_params_file_is_not_put_there(project, monkeypatch):
    (project / "docs").mkdir()
    monkeypatch.chdir(project / "docs")
    said = CliRunner().invoke(main, ["run", "--params", "../params.yaml"])
    assert said.stderr == "finercut run: neither params.yaml nor dvc.yaml is here; run from the project's root\n"
    assert list(Path().iterdir()) == []


def test_a_terminal_without_a_letter_shows_the_rest(project):
    code = "import pipelines.summary as s; s.markdown = lambda: 'x \u2013 y'; from pipelines.cli import main; main()"
    command = [sys.executable, "-c", code, "summary"]
    done = subprocess.run(command, capture_output=True, env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"})
    assert done.stdout == b"x ? y\n", done.stderr


def test_a_misspelt_field_is_an_error_before_anything_starts(project):
    settings = yaml.safe_load(Path("params.yaml").read_text())
    settings["search"]["divergense"] = settings["search"].pop("divergence")
    Path("params.yaml").write_text(yaml.safe_dump(settings))
    said = CliRunner().invoke(main, ["search"])
    assert said.exit_code == 1
    assert said.stderr.count("\n") == 1
    assert "search.divergense" in said.stderr


def test_another_params_file_replaces_params_yaml_and_what_it_was_is_kept(project, monkeypatch):
    settings = yaml.safe_load(Path("params.yaml").read_text())
    settings["prune"]["budget"]["amount"] = 0.125
    Path("other.yaml").write_text(yaml.safe_dump(settings))
    before = Path("params.yaml").read_text()
    monkeypatch.setattr("pipelines.cli._prepare_prefect", lambda: _raise(RuntimeError("that is enough")))
    said = CliRunner().invoke(main, ["run", "--params", "other.yaml"])
    assert said.exit_code == 1
    assert "params.yaml is now a copy of other.yaml; what it was is in .finercut/params.previous.yaml" in said.stderr
    assert Path("params.yaml").read_text() == Path("other.yaml").read_text()
    assert Path(".finercut/params.previous.yaml").read_text() == before


def test_a_params_file_with_an_error_replaces_nothing(project):
    Path("other.yaml").write_text("search: {}\n")
    before = Path("params.yaml").read_text()
    said = CliRunner().invoke(main, ["run", "--params", "other.yaml"])
    assert said.exit_code == 1
    assert said.stderr.startswith("finercut run: other.yaml: ")
    assert Path("params.yaml").read_text() == before


def test_params_explains_every_field_and_shows_its_value(project):
    said = CliRunner().invoke(main, ["params"]).output
    for name, section in Params.model_fields.items():
        assert f"{section.alias or name}:" in said
        for shape in get_args(section.annotation) or [section.annotation]:
            for field, about in shape.model_fields.items():
                assert re.search(rf"^  {field}:", said, re.MULTILINE)
                assert (about.description or "") in said
    assert '    kind: "package"  # package\n' in said
    assert "    repository:  # `owner/name`.\n" in said
    n_tokens = yaml.safe_load(Path("params.yaml").read_text())["calibrate"]["n_tokens"]
    assert f"  n_tokens: {n_tokens}  # Tokens in a window.\n" in said


def test_version_is_that_of_the_package():
    assert re.fullmatch(r"finercut \d+\.\d+\.\d+\n", CliRunner().invoke(main, ["--version"]).output)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("models:/tiny", "names no version; write models:/NAME@ALIAS"),
        ("nothing.jsonl", "no trajectory at nothing.jsonl"),
        (".", "no checkpoint in ."),
        ("runs:/abc", "runs:/abc is a run: `finercut report runs:/abc` makes its page"),
        ("selection.json", "no selection.json: run `finercut search` first"),
    ],
)
def test_inspect_says_what_it_cannot_read(project, what, message):
    said = CliRunner().invoke(main, ["inspect", what])
    assert said.exit_code == 1
    assert message in said.stderr


def test_registering_needs_the_reports(project):
    said = CliRunner().invoke(main, ["register"])
    assert said.exit_code == 1
    assert said.stderr == "finercut register: no reports/evaluate.json: run `finercut evaluate` first\n"
