"""What a machine lacks is made up for before a command does anything, or the command says what to set."""

from __future__ import annotations

import gc
import http.server
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import uuid
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import requests
from alembic.script import ScriptDirectory
from click.testing import CliRunner
from prefect.server.database.alembic_commands import alembic_config
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL, PREFECT_HOME, temporary_settings

from finercut.registry import runs
from finercut.system import machine
from finercut.system.imports import large_imports
from pipelines import dag, environment, prefect_database, settings
from pipelines.cli import main

ROOT = Path(__file__).parents[1]
PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "Http_Proxy")
CACHES = ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Without proxies, and as it was afterwards whatever `prepare` changes."""
    before = dict(os.environ)
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in (*PROXIES, "no_proxy", "NO_PROXY", "VLLM_PLUGINS", *CACHES):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_):
        pass


@pytest.fixture
def answering():
    """Starts servers on the loopback address that note the paths they are asked for."""
    started = []

    def start(handler: type[_Answers] = _Answers) -> http.server.ThreadingHTTPServer:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def prepared_environment(*before: str, **environment: str) -> tuple[dict[str, str], str]:
    """What `prepare` makes of it in a process of its own, and what that says.

    Args:
        before: a command that runs the command after it
    """
    code = "import os, json, finercut.system.machine as m; m.prepare(); m.prepare(); print(json.dumps({**os.environ}))"
    found = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([*before, sys.executable, "-c", code], env=found, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("name", PROXIES)
def test_loopback_is_never_asked_for_through_a_proxy(name, answering):
    proxy, own = answering(), answering()
    os.environ[name] = f"http://127.0.0.1:{proxy.server_port}"
    machine.prepare()
    for get in (requests.get, httpx.get):
        for host in ("127.0.0.1", "localhost"):
            assert get(f"http://{host}:{own.server_port}/{host}").status_code == 200
    assert len(own.asked) == 4
    assert proxy.asked == []
    if name.lower() != "https_proxy":
        requests.get("http://hub.example/model")
        assert proxy.asked == ["http://hub.example/model"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"NO_PROXY": "corp.example"}, "corp.example,127.0.0.1,localhost,::1"),
        ({"no_proxy": "corp.example, localhost"}, "corp.example,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "*"}, "*"),
        # httpx, and so Prefect's client, fails on what stands in brackets and on networks of IPv6 addresses
        ({"no_proxy": "[::1]:80, fd00::/8,10.0.0.0/8,localhost:80"}, "::1,10.0.0.0/8,localhost:80,127.0.0.1,localhost"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.2:5000/x"}, "127.0.0.1,localhost,::1,127.0.0.2"),
        ({"PREFECT_API_URL": "http://0.0.0.0:4200/api"}, "127.0.0.1,localhost,::1,0.0.0.0"),
    ],
)
def test_what_is_already_asked_for_directly_still_is(given, expected):
    os.environ.update({"HTTPS_PROXY": "http://proxy.example:3128"} | given)
    machine.prepare()
    machine.prepare()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == expected
    httpx.Client().close()


def test_without_a_proxy_nothing_is_set():
    machine.prepare()
    assert "no_proxy" not in os.environ
    assert "NO_PROXY" not in os.environ


def test_a_socks_proxy_without_its_packages_is_one_line_that_shows_no_password(monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda _: None)
    os.environ["ALL_PROXY"] = "socks5://me:correct-horse@proxy.example:1080"
    said = CliRunner().invoke(main, ["summary"])
    assert said.exit_code == 1
    assert said.stderr == (
        "finercut summary: ALL_PROXY names a SOCKS proxy, which needs two more packages: "
        "pip install socksio pysocks, or name an HTTP proxy\n"
    )
    assert CliRunner().invoke(main, ["fetch", "--help"]).exit_code == 0


@pytest.mark.parametrize(
    "address", ["socks://proxy.example:1080", "socks4://proxy.example:1080", "ftp://proxy.example"]
)
def test_a_proxy_of_a_kind_that_prefect_does_not_know_is_one_line(address):
    os.environ["ALL_PROXY"] = address
    with pytest.raises(ValueError, match="nknown scheme for proxy"):
        httpx.Client()
    with pytest.raises(RuntimeError, match=r"^ALL_PROXY names a proxy of kind \w+://; http, https, socks5, socks"):
        machine.prepare()


@pytest.mark.parametrize("name", ["a" * 90, "My Projects", "it's $HOME", "Größe"])
def test_a_temporary_folder_is_short_and_plain_enough_for_sockets_and_compilers(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    os.environ["TMPDIR"] = str(folder)
    machine.prepare()
    assert os.path.samefile(tempfile.gettempdir(), folder)
    assert os.environ["TMPDIR"] == tempfile.gettempdir()
    assert machine._PLAIN.fullmatch(tempfile.gettempdir())
    # As vLLM's engines meet, below a folder of their own.
    with tempfile.TemporaryDirectory(prefix="vllm-") as own, socket.socket(socket.AF_UNIX) as meeting:
        meeting.bind(f"{own}/{uuid.uuid4()}")


def test_a_temporary_folder_that_does_not_exist_is_passed_over_with_a_word(tmp_path):
    found, said = prepared_environment(TMPDIR=str(tmp_path / "nowhere"), HOME=str(tmp_path))
    assert Path(found["TMPDIR"]).is_dir()
    assert said == (
        f"TMPDIR is {tmp_path}/nowhere, where nothing can be written: temporary files go to {found['TMPDIR']}\n"
    )


@pytest.mark.parametrize("given", [".", "here", "here/"])
def test_a_temporary_folder_that_is_relative_stays_what_it_is_elsewhere(given, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    os.environ["TMPDIR"] = given
    machine.prepare()
    assert Path(os.environ["TMPDIR"]).is_absolute()
    assert os.path.samefile(os.environ["TMPDIR"], given)
    assert caplog.records == []


def test_cache_folders_can_be_written_to_and_are_plain_enough_for_compilers(tmp_path, caplog):
    spaced, file = tmp_path / "My Caches" / "new", tmp_path / "file"
    file.touch()
    os.environ |= {"XDG_CACHE_HOME": str(spaced), "VLLM_CACHE_ROOT": str(tmp_path), "TRITON_CACHE_DIR": str(file / "a")}
    machine.prepare()
    assert machine._PLAIN.fullmatch(os.environ["XDG_CACHE_HOME"])
    assert os.path.samefile(os.environ["XDG_CACHE_HOME"], spaced)
    assert os.environ["VLLM_CACHE_ROOT"] == str(tmp_path)
    assert "TRITON_CACHE_DIR" not in os.environ
    assert [r.getMessage() for r in caplog.records] == [
        f"TRITON_CACHE_DIR is {file}/a, which cannot be written to: it is passed over"
    ]


def test_what_is_compiled_does_not_go_where_nothing_is_run(tmp_path, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    mounted = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o noexec none {tmp_path} && exec "$@"', "-"]
    for before, expected in ((mounted, {"TORCHINDUCTOR_CACHE_DIR": f"{home}/.cache/torchinductor"}), ([], {})):
        found, _ = prepared_environment(*before, TMPDIR=str(tmp_path), HOME=str(home))
        assert {name: value for name, value in found.items() if name in CACHES} == expected


@pytest.mark.parametrize(
    ("shell", "expected"), [("/usr/sbin/nologin", "/bin/sh"), ("/no/such/shell", "/bin/sh"), ("/bin/bash", "/bin/bash")]
)
def test_stages_are_not_started_by_a_shell_that_runs_nothing(shell, expected):
    os.environ["SHELL"] = shell
    machine.prepare()
    assert os.environ["SHELL"] == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("0", None), ("", None), ("all", None), ("-1", None), ("4", "4"), ("4,2", "4,2")]
)
def test_what_is_no_number_of_threads_is_passed_over(given, expected):
    os.environ["OMP_NUM_THREADS"] = given
    machine.prepare()
    assert os.environ.get("OMP_NUM_THREADS") == expected


def test_pictures_are_drawn_whatever_a_notebook_sets():
    environment, _ = prepared_environment(MPLBACKEND="module://matplotlib_inline.backend_inline")
    subprocess.run([sys.executable, "-c", "import finercut.report.pictures"], env=environment, check=True)


def test_python_without_docstrings_is_one_line():
    code = "import finercut.system.machine as m; m.prepare()"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "RuntimeError: PYTHONOPTIMIZE is 2, or python was started with -OO" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PYTHONWARNINGS", "error", "PYTHONWARNINGS, or python -W, makes errors of warnings"),
        ("PYTHONWARNINGS", "ignore,error::DeprecationWarning", "PYTHONWARNINGS, or python -W, makes errors"),
        ("PYTHONWARNINGS", "ignore", None),
        ("MLFLOW_LOGGING_LEVEL", "rubbish", "MLFLOW_LOGGING_LEVEL is rubbish, and levels are CRITICAL"),
        ("PREFECT_LOGGING_LEVEL", "loud", "PREFECT_LOGGING_LEVEL is loud, and levels are"),
        ("VLLM_LOGGING_LEVEL", "rubbish", "VLLM_LOGGING_LEVEL is rubbish, and levels are"),
        ("VLLM_LOGGING_LEVEL", "debug", None),
        ("VLLM_LOGGING_CONFIG_PATH", "/nope", "VLLM_LOGGING_CONFIG_PATH is /nope, where no file is"),
    ],
)
def test_what_libraries_would_refuse_without_naming_it_is_named(name, value, said):
    code = "import finercut.system.machine as m; m.prepare()"
    environment = os.environ | {name: value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == (said is not None), done.stderr
    assert said is None or f"RuntimeError: {said}" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("home", ["/nonexistent", "/", None, "", "within a folder of another user"])
def test_a_user_without_a_name_and_a_home_gets_both(home, tmp_path):
    if home == "within a folder of another user":
        tmp_path.chmod(0o700)
        home = str(tmp_path / "hidden")
    code = (
        "import os, sys\nos.setgroups([]); os.setgid(54321); os.setuid(54321)\nsys.path.insert(0, sys.argv[1])\n"
        "from finercut.system.machine import prepare\nprepare()\nimport getpass\nfrom pathlib import Path\n"
        "(Path.home() / 'cache').mkdir(exist_ok=True)\nprint(getpass.getuser(), Path.home())"
    )
    # Read before the user changes, who may not look into this checkout.
    program = f"import finercut.system.machine, getpass, pathlib\n{code}"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | ({"HOME": home} if home is not None else {})
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["user-54321", f"{tempfile.gettempdir()}/finercut-54321"]
    assert "cannot be written to: caches go to" in done.stderr


def test_another_users_folder_is_not_taken(tmp_path):
    ours = machine._own_folder(tmp_path)
    assert ours.stat().st_mode & 0o777 == 0o700
    ours.chmod(0o777)
    assert machine._own_folder(tmp_path) is None
    ours.rmdir()
    (tmp_path / "elsewhere").mkdir()
    ours.symlink_to(tmp_path / "elsewhere")
    assert machine._own_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("given", "expected"), [("", "finercut"), ("other", "other,finercut"), ("finercut", "finercut")]
)
def test_vllm_loads_the_plugin_whatever_vllm_plugins_says(given, expected, caplog):
    os.environ["VLLM_PLUGINS"] = given
    machine.prepare()
    machine.prepare()
    assert os.environ["VLLM_PLUGINS"] == expected
    assert len(caplog.records) == (given != expected)


def test_an_environment_in_a_folder_with_a_space_is_started_by_a_plain_path(tmp_path):
    environment = tmp_path / "My Projects" / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    code = "from finercut.system.machine import interpreter; print(interpreter())"
    python = subprocess.run(
        [environment / "bin/python", "-c", code],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert machine._PLAIN.fullmatch(python)
    code = "import sys; print(sys.prefix)"
    prefix = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert machine._PLAIN.fullmatch(prefix)
    assert os.path.samefile(prefix, environment)


@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder away")
def test_a_clone_of_another_user_is_one_line_that_says_what_to_run(tmp_path, monkeypatch):
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    os.environ |= {"HOME": str(tmp_path / "home"), "LANG": "de_DE.UTF-8"}
    os.environ.pop("SUDO_UID", None)
    for path in (tmp_path, tmp_path / ".git"):
        os.chown(path, 54321, 54321)
    for contact in (dag.stages, lambda: settings.take_committed("params.yaml", {})):
        (tmp_path / "params.yaml").touch()
        with pytest.raises(RuntimeError, match="belongs to another user") as refusal:
            contact()
    (command,) = re.findall("`(.*)`", str(refusal.value))
    subprocess.run(command, shell=True, check=True)
    assert settings.git("rev-parse", "--git-dir") == b".git\n"


def test_without_git_a_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^git is not installed"):
        dag.stages()


SMI = """#!/bin/sh
echo "0, GPU-aaaa-1, NVIDIA A100"
echo "1, GPU-bbbb-2, NVIDIA H100, 80 GB"
"""


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, "NVIDIA A100"),
        ("", "cpu"),
        ("-1", "cpu"),
        ("1,0", "NVIDIA H100, 80 GB"),
        ("GPU-bbbb", "NVIDIA H100, 80 GB"),
        ("MIG-cccc-3", "NVIDIA A100"),
        ("7", "cpu"),
    ],
)
def test_the_hardware_is_the_gpu_that_processes_are_shown(visible, expected, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    assert environment._hardware() == expected


@pytest.fixture
def prefect_home(tmp_path):
    """A Prefect home, and how to give its database a version."""
    with temporary_settings({PREFECT_HOME: tmp_path, PREFECT_API_URL: None}, restore_defaults={PREFECT_API_URL}):
        url = f"sqlite+aiosqlite:///{tmp_path}/prefect.db"
        with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url}):
            yield tmp_path / "prefect.db"


def write_version(database: Path, version: str) -> None:
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("CREATE TABLE alembic_version (version_num TEXT)")
        opened.execute("INSERT INTO alembic_version VALUES (?)", (version,))


def test_a_prefect_database_of_another_version_is_found_before_a_server_is_started(prefect_home):
    prefect_database.check()  # there is none yet
    write_version(prefect_home, "ffffffffffff")
    with pytest.raises(RuntimeError, match=f"{prefect_home} is of another version than Prefect .*: set PREFECT_HOME"):
        prefect_database.check()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        prefect_database.check()  # no server is started then


def test_every_version_that_prefect_can_go_on_from_is_known(prefect_home):
    config = alembic_config()
    config.set_main_option("version_locations", str(prefect_database.MIGRATIONS))
    sqlite = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    assert sqlite
    assert prefect_database._revisions() == sqlite
    write_version(prefect_home, min(sqlite))
    prefect_database.check()


def test_a_prefect_database_that_is_none_is_one_line(prefect_home):
    prefect_home.write_bytes(b"no database at all" * 100)
    with pytest.raises(RuntimeError, match="is damaged .*: set PREFECT_HOME"):
        prefect_database.check()


def test_a_prefect_home_that_cannot_be_is_one_line(prefect_home):
    folder = prefect_home.parent / "file"
    folder.touch()
    for home in (folder, folder / "home"):
        with (
            temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{home}/prefect.db"}),
            pytest.raises(RuntimeError, match=rf"^Prefect's folder {home} cannot be made \(.*\): set PREFECT_HOME"),
        ):
            prefect_database.check()


class _OlderTrackingServer(_Answers):
    """Of MLflow's interface what a server without `lacking` has."""

    def do_GET(self):
        self.server.asked.append(self.path)
        known = {
            "/experiments/get-by-name": {"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}},
            "/experiments/set-experiment-tag": {},
            "/logged-models/search": {"models": []},
        }
        found = None if self.server.lacking in self.path else [v for k, v in known.items() if k in self.path]
        body = json.dumps(found[0] if found else {"error_code": "ENDPOINT_NOT_FOUND"}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()


def test_large_imports_are_without_garbage_collections_and_leave_them_as_they_were():
    with large_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with large_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("lacking", "said"), [("logged-models", "find logged models"), ("registered-models", "find a model registry")]
)
def test_a_tracking_server_that_cannot_register_is_found_before_a_run_is_opened(lacking, said, answering):
    server = answering(_OlderTrackingServer)
    server.lacking = lacking
    os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(RuntimeError, match=f"cannot {said}.* in MLflow at http://127.0.0.1"):
        runs.open_run("tests", {"a": 1}, {}, "tiny")
    assert lacking in server.asked[-1]
    assert not any("runs/create" in path for path in server.asked)
