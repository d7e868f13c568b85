"""Registered versions: naming one, and bringing its files from a server that means no good."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import mlflow
import pytest
from mlflow.entities.model_registry import ModelVersion

from finercut.registry import versions
from finercut.registry.versions import VersionReference
from pipelines import inspection


@pytest.mark.parametrize("uri", ["models:/tiny@champion", "models:/tiny/3"])
def test_a_reference_is_its_uri(uri):
    assert VersionReference.parse(uri).uri == uri


@pytest.mark.parametrize("uri", ["models:/tiny", "models:/tiny@a@b", "models:m-1", "tiny", "models:/tiny/latest"])
def test_a_uri_that_names_no_version_is_refused(uri):
    with pytest.raises(ValueError, match=r"write models:/NAME@ALIAS or models:/NAME/VERSION"):
        VersionReference.parse(uri)


def test_an_unknown_model_and_an_unknown_version_are_one_line(mlflow_store):
    with pytest.raises(RuntimeError, match=r"^cannot find nobody in MLflow at sqlite:.*: .*nobody"):
        inspection.describe("models:/nobody@challenger")
    mlflow.MlflowClient(mlflow_store).create_registered_model("known")
    with pytest.raises(RuntimeError, match=r"^cannot find models:/known/7 in MLflow at sqlite:"):
        inspection.describe("models:/known/7")


@pytest.fixture
def hostile(monkeypatch):
    """A server that names artifacts as it is told to, and gives out any."""

    class Answers(BaseHTTPRequestHandler):
        listed: tuple[dict, ...] = ()

        def do_GET(self):
            url = urlsplit(self.path)
            if url.path.endswith("/registered-models/get"):
                self.answer(json.dumps({"registered_model": {"name": "m"}}))
            elif url.path.endswith("/get-download-uri"):
                self.answer(json.dumps({"artifact_uri": "mlflow-artifacts:/m"}))
            elif url.path.endswith("/mlflow-artifacts/artifacts"):
                asked = parse_qs(url.query)["path"][0]
                self.answer(json.dumps({"files": list(self.listed) if asked.endswith("checkpoint") else []}))
            elif "/mlflow-artifacts/artifacts/" in url.path:
                self.answer("stolen")
            else:
                self.answer("{}", 404)

        def answer(self, text, status=200):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://user:secret@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        mlflow.set_tracking_uri(address)
        yield Answers
        server.shutdown()


VERSION = ModelVersion("m", "1", 0)


def test_files_of_a_server_land_in_their_folder(hostile, tmp_path):
    hostile.listed = ({"path": "config.json", "is_dir": False, "file_size": 6},)
    folder = versions.download(VERSION, "checkpoint", tmp_path / "in")
    assert folder == tmp_path / "in" / "checkpoint"
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"config.json": "stolen"}


@pytest.mark.parametrize("is_dir", [False, True])
@pytest.mark.parametrize(
    "name",
    ["../../evil", "/tmp/finercut-evil", "a/../../../evil", "..%2F..%2Fevil", "%2e%2e/%2e%2e/evil", "file:///evil"],
)
def test_no_name_a_server_gives_leads_out_of_the_folder(hostile, tmp_path, name, is_dir):
    hostile.listed = ({"path": name, "is_dir": is_dir, "file_size": 6},)
    with pytest.raises(RuntimeError, match=r"^cannot download models:/m/1/checkpoint .*[Ii]nvalid.* path") as error:
        versions.download(VERSION, "checkpoint", tmp_path / "in")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert {p.name for p in tmp_path.iterdir()} <= {"in"}
    assert "secret" not in str(error.value)
