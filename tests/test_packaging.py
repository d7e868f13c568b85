"""What a user gets who installs the wheel, and what the README tells them to type."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

import finercut
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


def test_the_wheel_holds_the_library_with_the_pipeline_inside_and_nothing_else(wheel):
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "finercut").rglob("*.py")}
    sources |= {f"finercut/{p.relative_to(ROOT)}" for p in (ROOT / "pipelines").rglob("*.py")}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == sources


def test_the_wheel_brings_the_command_vllms_plugin_and_the_licence(wheel):
    def content(end):
        return wheel.read(next(name for name in wheel.namelist() if name.endswith(end))).decode()

    assert "finercut = finercut.system.command:main" in content("entry_points.txt")
    assert "[vllm.general_plugins]\nfinercut = finercut.serving.vllm_plugin:register" in content("entry_points.txt")
    assert "License-Expression: Apache-2.0" in content("METADATA")
    assert f"Version: {finercut.__version__}\n" in content("METADATA")
    assert content("licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_the_wheel_unpacked_anywhere_runs(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        "import sys; from finercut.system import command; sys.argv = ['finercut', '--help']\n"
        "try: command.main()\n"
        "finally: print(sys.modules['finercut.pipelines.cli'].__file__, 'pipelines' in sys.modules)"
    )
    shown = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
    assert f"{tmp_path}/finercut/pipelines/cli.py False" in shown
    assert "finercut inspect" in shown


def test_the_version_is_written_once():
    assert importlib.metadata.version("finercut") == finercut.__version__
    assert f"## {finercut.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert finercut.__version__ not in (ROOT / "pyproject.toml").read_text()


def commands(pattern: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = (line.split("#")[0].strip() for block in blocks for line in block.splitlines())
    return sorted({line for line in lines if re.match(pattern, line)})


@pytest.mark.parametrize("command", commands("finercut "))
def test_the_readmes_commands_exist(command):
    arguments = [word for word in command.split()[1:] if not word.endswith(".yaml")]
    assert CliRunner().invoke(main, [*arguments[:1], "--help"]).exit_code == 0


def test_the_readmes_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert {"make demo", "make test"} <= set(commands("make "))
    assert all(re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE) for command in commands("make "))


def test_the_readmes_file_map_names_every_room_once():
    page = README.partition("## Where things are")[2]
    for folder in [p for p in (ROOT / "finercut").iterdir() if (p / "__init__.py").is_file()]:
        assert len(re.findall(rf"^  {folder.name}/ ", page, re.MULTILINE)) == 1, folder.name


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
