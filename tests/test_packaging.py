"""What a user gets who installs the wheel, and what the README tells them to type."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
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
    library = ROOT / "finercut"
    sources = {str(p.relative_to(ROOT)) for pattern in ("*.py", "*.jinja") for p in library.rglob(pattern)}
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


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """What runs a program in an environment that has the wheel, and of this one all but the project itself."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "venv", "--without-pip", folder / "venv"]
    subprocess.run(command, check=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", folder / "venv/bin/python", "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", wheel.filename], check=True)
    others = folder / "others"  # a link each: an editable install of the project is among them, by a .pth file
    others.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.lower().startswith(("finercut", "_finercut", "__editable__")):
            (others / package.name).symlink_to(package)
    (packages / "others.pth").write_text(f"{others}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> str:
        command = [folder / "venv/bin" / program, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_an_environment_with_the_wheel_has_the_command_and_no_package_called_pipelines(installed):
    found = "import importlib.util as u, finercut; print(u.find_spec('pipelines'), finercut.__file__)"
    said = installed("python", "-c", found)
    assert said.startswith("None ")
    assert str(ROOT) not in said
    assert installed("finercut", "--version") == f"finercut {finercut.__version__}\n"
    assert "finercut inspect" in installed("finercut", "--help")


@pytest.mark.slow  # imports torch and transformers anew
def test_an_environment_with_the_wheel_inspects_a_checkpoint_and_shows_vllm_the_plugin(installed, tiny_pruned):
    assert "2 of 8 sublayers removed" in installed("finercut", "inspect", str(tiny_pruned))
    plugin = (
        "from importlib.metadata import entry_points\n"
        "(found,) = [e for e in entry_points(group='vllm.general_plugins') if e.name == 'finercut']\n"
        "print(found.load().__module__)"
    )
    assert installed("python", "-c", plugin) == "finercut.serving.vllm_plugin\n"


@pytest.mark.slow  # imports Prefect anew
def test_stages_start_by_name_from_the_wheel_as_from_a_clone(installed):
    code = (
        "from finercut.pipelines.cli_stages import runner\n"
        "from finercut.pipelines.prefect_yaml import ENTRYPOINT\n"
        "print(runner('calibrate').__module__, runner('heal').func.__module__, ENTRYPOINT)"
    )
    names = installed("python", "-c", code).split()
    assert names == ["finercut.pipelines.calibrate", "finercut.pipelines.steps", "finercut.pipelines.flow.compress"]


def test_the_version_is_written_once():
    assert f"## {finercut.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert finercut.__version__ not in (ROOT / "pyproject.toml").read_text()
    assert CliRunner().invoke(main, ["--version"]).output == f"finercut {finercut.__version__}\n"


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


def test_a_command_of_another_clone_is_refused_where_the_code_differs(tmp_path):
    for package in ("finercut", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", "from finercut.system.command import main; main()", "--version"]
    # As from an environment of ROOT's: the current directory is not looked at for modules.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    assert subprocess.run(command, **run, check=True).stdout.startswith("finercut ")
    (tmp_path / "pipelines/environment.py").write_text("# changed\n")
    refused = subprocess.run(command, **run, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"finercut: the code in this folder is another than that of {ROOT}, which this")
