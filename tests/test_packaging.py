"""What a user gets who installs the wheel, and what the README tells them to type."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from finercut.model import families
from pipelines import params
from pipelines.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(directory), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return zipfile.ZipFile(next(directory.glob("*.whl")))


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    sources = {
        str(p.relative_to(ROOT)) for package in ("finercut", "pipelines") for p in (ROOT / package).rglob("*.py")
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == sources


def test_the_wheel_brings_the_command_and_vllms_plugin(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entry_points = wheel.read(name).decode()
    assert "finercut = pipelines.cli:main" in entry_points
    assert "[vllm.general_plugins]\nfinercut = finercut.serving.vllm_plugin:register" in entry_points


def test_the_wheel_unpacked_anywhere_runs(wheel, tmp_path):
    wheel.extractall(tmp_path)
    command = [sys.executable, "-c", "import pipelines.cli as c; print(c.__file__); c.main(['--help'])"]
    shown = subprocess.check_output(command, cwd=tmp_path, text=True)
    assert str(tmp_path) in shown
    assert "finercut inspect" in shown


def commands(pattern: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = (line.split("#")[0].strip() for block in blocks for line in block.splitlines())
    return sorted({line for line in lines if re.match(pattern, line)})


@pytest.mark.parametrize("command", commands("finercut "))
def test_the_readmes_commands_exist(command):
    arguments = [word for word in command.split()[1:] if not word.endswith(".yaml")]
    assert CliRunner().invoke(main, [*arguments[:1], "--help"]).exit_code == 0


def test_the_quick_start_is_two_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    assert commands("make ") == ["make demo", "make test"]
    assert all(re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE) for command in commands("make "))


def test_the_readmes_file_map_is_complete():
    listed = set(re.findall(r"[\w]+\.py", README.partition("## Where things are")[2]))
    stages = {"fetch.py", "calibrate.py", "search.py", "prune.py", "evaluate.py", "throughput.py", "register.py"}
    modules = {p.name for package in ("finercut", "pipelines") for p in (ROOT / package).glob("*.py")}
    assert modules - stages - {"__init__.py"} <= listed
    assert {name for name in listed if not (ROOT / "finercut" / name).exists()} <= modules


@pytest.mark.parametrize("file", sorted((ROOT / "params").glob("*.yaml")), ids=lambda file: file.name)
def test_every_ready_params_file_is_valid(file):
    params.load(file)


def test_the_readme_names_the_families():
    known = {
        _plain(name) for name in re.split(r",| and ", README.partition("Known families: ")[2].partition(". Of")[0])
    }
    assert {_plain(model_type) for model_type in families.FAMILIES} <= known


def _plain(name: str) -> str:
    """`Gemma 3 (text)` and `gemma3_text` -> gemma3text; `Llama (with SmolLM2)` -> llama."""
    name = re.sub(r"\((with .*|Pythia)\)", "", name)
    return re.sub(r"[^a-z0-9]", "", name.lower())
