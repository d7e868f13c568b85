"""Models from the hub, whose protocol is spoken on this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fetching import params
from hub_server import COMMIT, Hub, Repository, answer_of, client_environment, serve

from finercut.model.tensors import weights_sha256
from finercut.sources.models import fetch_model
from finercut.sources.settings import HubModel
from pipelines import fetch, paths

pytestmark = pytest.mark.usefixtures("without_vllm")


CLIENT = """
import json, sys
from pathlib import Path
from finercut.sources.settings import HubModel
from finercut.sources import gguf, revisions
from finercut.sources.gguf import dequantise
from finercut.sources.models import fetch_model
outcomes = []
for number, (repository, revision) in enumerate(json.loads(sys.argv[1])):
    directory = Path(str(number))
    directory.mkdir()
    source = HubModel(kind="hub", repository=repository, revision=revision)
    try:
        origin = fetch_model(source, directory, Path("work"))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        outcomes.append(f"{type(error).__name__}: {error}")
    else:
        outcomes.append([origin.source, origin.revision])
print(json.dumps(outcomes))
"""

STAGE = """
import json, sys
from finercut.serving import vllm_engine
from pipelines.params import Params
from pipelines import fetch
vllm_engine.find_spec = lambda name: None
fetch.run(Params.model_validate_json(sys.argv[1]))
"""


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def outcomes(tiny_model, tmp_path_factory):
    """What became of (repository, revision), all asked in one process; and the folder of what arrived."""
    files = files_of(tiny_model)
    extra = {"notes.md": b"#", "modeling.py": b"raise", "pytorch_model.bin": b"x", "original/model.safetensors": b"x"}
    pickled = {("pytorch_model.bin" if n == "model.safetensors" else n): c for n, c in files.items()}
    coded = files | {"config.json": json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}).encode()}
    hub = Hub(
        {
            "org/good": Repository(COMMIT, files | extra),
            "org/gated": Repository(COMMIT, files, gated=True),
            "org/pickled": Repository(COMMIT, pickled),
            "org/coded": Repository(COMMIT, coded),
            "org/forbidden": Repository(COMMIT, files, status=403),
            "org/broken": Repository(COMMIT, files, status=500),
        }
    )
    asked = [
        ("org/good", "main"),
        ("org/good", COMMIT),
        ("org/good", "v9"),
        ("org/gated", "main"),
        ("org/pickled", "main"),
        ("org/coded", "main"),
        ("org/absent", "main"),
        ("org/forbidden", "main"),
        ("org/broken", "main"),
    ]
    folder = tmp_path_factory.mktemp("hub")
    with serve(hub):
        answers = answer_of(CLIENT, json.dumps(asked), endpoint=hub.endpoint, folder=folder)
    return dict(zip(asked, answers, strict=True)), folder, hub


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_branch_is_recorded_as_its_commit(outcomes, revision):
    assert outcomes[0]["org/good", revision] == ["org/good", COMMIT]


def test_only_config_tokenizer_and_safetensors_leave_the_hub(outcomes, tiny_model):
    _, folder, hub = outcomes
    assert files_of(folder / "0") == files_of(tiny_model)
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {file.name for file in tiny_model.iterdir()}
    assert not any((folder / "work").glob("*/*.safetensors"))


def test_what_was_downloaded_once_comes_from_the_cache(outcomes):
    weights = [path for method, path in outcomes[2].requests if method == "GET" and path.endswith("model.safetensors")]
    assert len([path for path in weights if "org/good/resolve" in path]) == 1
    assert files_of(outcomes[1] / "0") == files_of(outcomes[1] / "1")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("org/good", "v9"), "ValueError: org/good has no revision 'v9': name a branch, tag or commit"),
        (("org/gated", "main"), "RuntimeError: org/gated is gated: accept its licence at http"),
        (("org/pickled", "main"), "ValueError: org/pickled has only pickled weights (pytorch_model.bin)"),
        (("org/coded", "main"), "ValueError: org/coded (mine) needs Python code of its own"),
        (("org/absent", "main"), "ValueError: no repository http"),
        (("org/forbidden", "main"), "RuntimeError: http://127.0.0.1"),
        (("org/broken", "main"), "NoAnswer: http://127.0.0.1"),
    ],
)
def test_what_the_hub_refuses_is_explained(outcomes, asked, message):
    assert outcomes[0][asked].startswith(message)


@pytest.mark.parametrize("repository", ["org/gated", "org/absent", "org/forbidden"])
def test_where_a_token_may_help_the_error_says_how_to_give_one(outcomes, repository):
    assert outcomes[0][repository, "main"].endswith("give a token: `hf auth login`, or set HF_TOKEN")


def test_weights_are_not_downloaded_for_a_model_that_is_refused(outcomes):
    assert not any("org/coded" in path and path.endswith(".safetensors") for _, path in outcomes[2].requests)


def test_an_unreachable_hub_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps([("org/good", "main")])],
        cwd=tmp_path,
        env=client_environment("http://127.0.0.1:9", tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    (outcome,) = json.loads(done.stdout.splitlines()[-1])
    assert outcome.startswith("NoAnswer: cannot reach http://127.0.0.1:9/org/good: check the network")


def test_offline_mode_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE is set: unset it for org/good"):
        fetch_model(HubModel(kind="hub", repository="org/good", revision="main"), tmp_path, tmp_path)


def test_offline_the_commit_is_named_that_the_cache_has_of_a_branch(tmp_path, monkeypatch):
    repository = tmp_path / "models--org--kept"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=f"or write revision: {COMMIT}, which this machine's cache has"):
        fetch_model(HubModel(kind="hub", repository="org/kept", revision="main"), tmp_path / "model", tmp_path)


def test_a_fetch_killed_on_the_way_leaves_nothing_and_is_taken_up_again(tiny_model, tmp_path):
    hub = Hub({"org/slow": Repository(COMMIT, files_of(tiny_model), stalls_at="model.safetensors")})
    settings = params({"kind": "hub", "repository": "org/slow", "revision": "main"}).model_dump_json(by_alias=True)
    with serve(hub):
        call = {"cwd": tmp_path, "env": client_environment(hub.endpoint, tmp_path / "home"), "text": True}
        running = subprocess.Popen([sys.executable, "-c", STAGE, settings], **call)
        while not hub.stalled.wait(0.1):
            assert running.poll() is None
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not (tmp_path / paths.MODEL).exists()
        assert not (tmp_path / paths.report("fetch")).exists()
        hub.go_on.set()
        subprocess.run([sys.executable, "-c", STAGE, settings], **call, check=True, timeout=300)
    fetched = tmp_path / paths.MODEL
    assert {file.name for file in fetched.iterdir()} == {file.name for file in tiny_model.iterdir()}
    assert weights_sha256(fetched) == weights_sha256(tiny_model)
    assert weights_sha256(fetched) == fetch.FetchReport.read(tmp_path / paths.report("fetch")).sha256
    assert hub.requests.count(("GET", f"org/slow/resolve/{COMMIT}/config.json")) == 1
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == ["model"]


def test_what_the_stage_notes_in_config_json_does_not_reach_the_cache(tiny_model, tmp_path):
    files = files_of(tiny_model)
    hub = Hub({"org/good": Repository(COMMIT, files)})
    settings = params({"kind": "hub", "repository": "org/good", "revision": "main"}).model_dump_json(by_alias=True)
    with serve(hub):
        call = {"cwd": tmp_path, "env": client_environment(hub.endpoint, tmp_path / "home"), "text": True}
        subprocess.run([sys.executable, "-c", STAGE, settings], **call, check=True, timeout=300)
    (snapshot,) = (tmp_path / "home").glob("hub/models--org--good/snapshots/*")
    fetched = tmp_path / paths.MODEL
    (fetched / "config.json").write_text("{}")
    assert {file.name: file.read_bytes() for file in snapshot.iterdir()} == files
    weights = fetched / "model.safetensors"
    assert weights.stat().st_ino == (snapshot / "model.safetensors").stat().st_ino  # no second copy on the disk
