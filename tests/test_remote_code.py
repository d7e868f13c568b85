"""Models with Python code of their own: taken only where it is trusted, run only while it is what was trusted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_tokenizer
from hub_server import COMMIT, ROOT, Hub, Repository, client_environment, serve
from own_code import random_own
from transformers import AutoModelForCausalLM

from finercut.checkpoint.steps import Proof, step
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load_pruned, load_whole
from finercut.model.masking import masked
from finercut.model.remote_code import TRUSTED_KEY, code_sha256, note_trusted
from finercut.sources.corrections import settle
from finercut.sources.models import fetch_model
from finercut.sources.settings import HubModel, LocalModel
from finercut.sublayers import parse
from finercut.tokens import Tokens, write_tokens
from pipelines import evaluate, evaluate_whole, fetch, params, paths, prove_whole, prune, search, steps

CODE = Path(__file__).parent / "own_code"
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


def settings(source: dict) -> params.Params:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["fetch"] = {"source": source}
    values["search"] |= {"per": None, "fill": False, "dtype": "float32", "device": "cpu", "removals": 3}
    values["search"]["continuation_tokens"] = 4
    values["heal"] = {"method": "none"}
    values["prune"] = {"budget": {"unit": "sublayers", "amount": 3}}
    values["evaluate"] |= {
        "tasks": [{"name": "finercut_agreement", "metric": "acc", "limit": 4}],
        "dtype": "float32",
        "device": "cpu",
    }
    values["throughput"] |= {"max_model_len": 256, "input_tokens": 32, "output_tokens": 32}
    return params.Params.model_validate(values)


def change_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write_own(directory: Path, canary: Path, tokenizer) -> Path:
    """The model as its author publishes it; its code leaves a file behind when it runs."""
    random_own().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    change_config(directory, auto_map=AUTO_MAP)
    for name in ("configuration_own.py", "modeling_own.py"):
        text = (CODE / name).read_text()
        (directory / name).write_text(f"{text}\n\nopen({str(canary)!r}, 'a').close()\n")
    return directory


@pytest.fixture
def canary(tmp_path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def own(tmp_path, canary, tokenizer, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_own(tmp_path / "own", canary, tokenizer)


def trusting(directory: Path, sha256: str | None = None) -> params.Params:
    return settings({"kind": "local", "path": str(directory), "trust_remote_code": sha256 or code_sha256(directory)})


def test_code_nobody_trusts_is_not_run_and_the_error_says_how_to_trust_it(own, canary):
    with pytest.raises(ValueError, match=f"it is trusted: read it, then write trust_remote_code: {code_sha256(own)}"):
        fetch.run(settings({"kind": "local", "path": str(own)}))
    assert not canary.exists()
    assert not paths.MODEL.exists()


def test_other_code_than_the_trusted_is_not_run(own, canary):
    trusted = code_sha256(own)
    with (own / "modeling_own.py").open("a") as file:
        file.write("# one line more\n")
    with pytest.raises(ValueError, match=f"write trust_remote_code: {code_sha256(own)}"):
        fetch.run(trusting(own, trusted))
    assert not canary.exists()


def test_a_model_cannot_vouch_for_itself(own, canary):
    note_trusted(own, code_sha256(own))
    for source in (settings({"kind": "local", "path": str(own)}), trusting(own)):
        with pytest.raises(ValueError, match=f"{TRUSTED_KEY}, which only finercut may note"):
            fetch.run(source)
    assert not canary.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("reference", ["other/repository--code.Tokenizer", "/elsewhere/code.Tokenizer"])
def test_code_that_lies_elsewhere_is_not_run(own, canary, file, reference):
    changed = json.loads((own / file).read_text())
    changed["auto_map"] = {**changed.get("auto_map", {}), "AutoTokenizer": [reference, None]}
    (own / file).write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"names '{reference}', which is no `file.Class` beside config.json"):
        fetch.run(trusting(own))
    assert not canary.exists()


def test_trust_in_a_model_that_needs_none_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="transformers has llama itself, no code of .* take trust_remote_code out"):
        fetch.run(trusting(tiny_model))


def test_code_changed_after_it_was_fetched_is_not_run(own, canary):
    fetch.run(trusting(own))
    canary.unlink()
    with (paths.MODEL / "modeling_own.py").open("a") as file:
        file.write("open('changed', 'w').close()\n")
    for read in (lambda m: m.config, lambda m: m.tokenizer, load_whole):
        with pytest.raises(ValueError, match="not those that were trusted when they were fetched, and are not run"):
            read(ModelDirectory(paths.MODEL))
    assert not canary.exists()
    assert not Path("changed").exists()


WITHOUT_FINERCUT = """
import sys
sys.modules["finercut"] = None
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    print("canary" if Path(sys.argv[4]).exists() else "refused:", error)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_it_goes_through_the_stages_to_a_checkpoint_that_carries_its_code(own, canary, tokens, tmp_path):
    chosen = trusting(own)
    assert fetch.run(chosen).model_type == "own"
    paths.CALIBRATION.mkdir()
    write_tokens(paths.CALIBRATION, Tokens(tokens[:4], tokens[4:]), {})
    removed = search.run(chosen).removals
    report = prune.run(chosen)
    assert report.removed == [str(s) for name in removed for s in parse(name).sublayers]
    mlp = 32 * 64 + 64 + 64 * 32 + 32 + 32 + 32
    attention = 32 * 32 + 32 + 32 + 32
    assert report.whole_parameters - report.pruned_parameters == sum(
        mlp if name.endswith("mlp") else attention for name in report.removed
    )
    for name in ("heal", "quantise"):
        steps.run_and_report(name, chosen)
    evaluate_whole.run(chosen)
    evaluate.run(chosen)
    proof = Proof(tokens[4:], chosen.prove.logit_tolerance, torch.device("cpu"))
    assert all(step(name).claim(parent, child, proof).holds for name, parent, child in steps.chain())

    whole = random_own()
    with torch.no_grad(), masked(whole, [parse(n).sublayers[0] for n in removed], ModelDirectory(paths.MODEL).layout):
        expected = whole(tokens).logits
        assert torch.allclose(load_pruned(paths.PRUNED)(tokens).logits, expected, atol=1e-5)
    assert "trust_remote_code=True" in (paths.PRUNED / "README.md").read_text()

    torch.save(tokens, "tokens.pt")
    canary.unlink()
    told = subprocess.check_output(
        [sys.executable, "-c", WITHOUT_FINERCUT, str(paths.PRUNED), "tokens.pt", "logits.pt", str(canary)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert told.startswith("refused:")
    assert canary.exists()
    assert torch.allclose(torch.load("logits.pt"), expected, atol=1e-5)
    with pytest.raises(ValueError, match="pass the argument `trust_remote_code=True`"):
        AutoModelForCausalLM.from_pretrained(paths.PRUNED, trust_remote_code=False)

    with pytest.raises(ValueError, match="vLLM has no model of it: it cannot be served"):
        prove_whole.run(chosen)

    with (paths.PRUNED / "modeling_finercut.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(ValueError, match="not those that were trusted"):
        load_pruned(paths.PRUNED)


def test_a_models_file_named_like_one_of_ours_is_refused(own):
    shutil.copyfile(own / "modeling_own.py", own / "modeling_pruned.py")
    with pytest.raises(ValueError, match=r"has a modeling_pruned.py, as finercut's own file is called"):
        fetch.run(trusting(own))


@pytest.mark.parametrize(
    ("revision", "trusted", "message"),
    [
        ("main", f"org/own@{COMMIT}", "revision must be the commit whose code is trusted"),
        (COMMIT, "true", f"trust_remote_code can only be org/own@{COMMIT}"),
        (COMMIT, f"org/other@{COMMIT}", f"trust_remote_code can only be org/own@{COMMIT}"),
    ],
)
def test_trust_in_a_repository_names_it_and_its_commit(revision, trusted, message):
    with pytest.raises(ValueError, match=message):
        HubModel(kind="hub", repository="org/own", revision=revision, trust_remote_code=trusted)


FETCH = """
import sys
from pathlib import Path
from pipelines.params import Params
from pipelines import fetch
canary, untrusting, trusting = sys.argv[1:]
try:
    fetch.run(Params.model_validate_json(untrusting))
except ValueError as error:
    print("canary" if Path(canary).exists() else "refused:", error)
fetch.run(Params.model_validate_json(trusting))
"""


def test_a_repository_is_trusted_at_one_commit(own, canary, tmp_path):
    files = {file.name: file.read_bytes() for file in own.iterdir()}
    hub = Hub({"org/own": Repository(COMMIT, files | {"sub/code.py": b"raise"})})
    untrusting = {"kind": "hub", "repository": "org/own", "revision": "main"}
    trusted = {**untrusting, "revision": COMMIT, "trust_remote_code": f"org/own@{COMMIT}"}
    given = [settings(source).model_dump_json(by_alias=True) for source in (untrusting, trusted)]
    with serve(hub):
        told = subprocess.check_output(
            [sys.executable, "-c", FETCH, str(canary), *given],
            env=client_environment(hub.endpoint, tmp_path / "home"),
            text=True,
        )
    assert told.startswith("refused: org/own (own) needs Python code of its own")
    assert told.endswith(f"write revision: {COMMIT} and trust_remote_code: org/own@{COMMIT}\n")
    assert json.loads((paths.MODEL / "config.json").read_text())[TRUSTED_KEY] == code_sha256(own)
    assert canary.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys; sys.exit(7)\n", r"its code ends the program \(7\)"),
        (
            "from .parts.norms import Norm\n",
            "modeling_own.py imports from the folder parts, and folders of code are not",
        ),
    ],
)
def test_code_that_is_not_as_expected_is_one_line(tmp_path, text, said):
    own = tmp_path / "own"
    random_own().save_pretrained(own)
    make_tokenizer().save_pretrained(own)
    for file in CODE.glob("*.py"):
        shutil.copyfile(file, own / file.name)
    (own / "modeling_own.py").write_text(text + (own / "modeling_own.py").read_text())
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    source = {"kind": "local", "path": str(own), "trust_remote_code": code_sha256(own)}
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    with pytest.raises(ValueError, match=said):
        origin = fetch_model(LocalModel(**source), fetched, tmp_path / "work")
        settle(fetched, origin.source)
