"""Small real parts shared by the tests: a random Llama with a real tokenizer, and tokens for it."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import servers

from finercut.system.imports import freeze_imports, large_imports

pytest.register_assert_rewrite("bad_input")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One test a core: threads of several would wait for each other at every operation.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TEXT = [
    "The river rises in the mountains of the north and runs through three countries before it meets the sea.",
    "Coffee, cotton and copper made the port rich; when prices fell, the people moved to the capital.",
    "A treaty of 1922 drew the border along the ridge, and a second one, ten years later, moved it to the lake.",
    "Winters are dry and mild, summers hot and wet, and most of the rain falls in two short seasons.",
    "The parliament has two chambers; the upper one is elected by the provinces for a term of six years.",
]


def make_tokenizer(vocab_size=400):
    """A byte-level BPE with BOS, EOS and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    """One that puts BOS before a text by itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def random_llama(**changes):
    """A fresh random Llama of 4 blocks; the same one for the same arguments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 400,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.15,  # large enough that every sublayer matters
    } | changes
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def write_tiny(folder: Path) -> tuple[Path, Path]:
    """A random 4-block Llama in Hugging Face layout, and a text to calibrate it on."""
    model, text = folder / "model", folder / "text.txt"
    random_llama().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    text.write_text("\n\n".join(TEXT * 6))
    return model, text


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> Path:
    """Directory of a random 4-block Llama in Hugging Face layout. Read it, do not write to it."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    random_llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_pruned(tmp_path_factory, tiny_model) -> Path:
    """The tiny model less 2.attention and 3.mlp. Read it, do not write to it."""
    from finercut.checkpoint.writing import write_pruned
    from finercut.sublayers import Sublayer

    directory = tmp_path_factory.mktemp("tiny") / "pruned"
    removed = [Sublayer(2, "attention"), Sublayer(3, "mlp")]
    write_pruned(tiny_model, removed, directory, {"source": "tiny"}, "# card\n")
    return directory


@pytest.fixture
def without_vllm(monkeypatch):
    """Where vLLM is not installed, nobody waits until it is imported."""
    from finercut.serving import vllm_engine

    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)


@pytest.fixture(scope="session")
def compressed(tmp_path_factory, tiny_model) -> Path:
    """A project of the tiny model in which everything up to `quantise` has run. Read it, do not write to it."""
    from bad_input import compress

    root = tmp_path_factory.mktemp("compressed")
    compress(root, tiny_model)
    return root


@pytest.fixture
def workspace(compressed, tmp_path, monkeypatch) -> Path:
    """A copy of it, and the current directory."""
    root = shutil.copytree(compressed, tmp_path / "project")
    monkeypatch.chdir(root)
    logging.getLogger("finercut").setLevel(logging.INFO)
    return root


@pytest.fixture(scope="session")
def tokens():
    """(6, 24) token ids for the tiny model."""
    import torch

    return torch.randint(3, 400, (6, 24), generator=torch.Generator().manual_seed(1))


def few_tokens(n, seed):
    """(n, 24) ids of few tokens, so that what holds for some windows holds for others."""
    import torch

    return torch.randint(3, 30, (n, 24), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_model, tokens):
    """The current folder, in which fetch and calibrate have run."""
    from stage_project import fill

    monkeypatch.chdir(tmp_path)
    fill(tiny_model, tokens)
    return tmp_path


@pytest.fixture(scope="session")
def sqlite_store(tmp_path_factory) -> str:
    """The address of an SQLite store of MLflow.

    One for all tests, because the first use of a store takes seconds: let each have an experiment of its own.
    """
    import sqlalchemy

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
    def do_not_wait_for_the_disk(connection, _):
        # MLflow commits dozens of times a run, each of which waits as long as many a test takes.
        if isinstance(connection, sqlite3.Connection):
            with suppress(sqlite3.DatabaseError):  # of a file that is none: the product is to find that out
                connection.execute("PRAGMA synchronous=OFF")

    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def mlflow_store(sqlite_store, monkeypatch) -> str:
    """`sqlite_store`, which MLFLOW_TRACKING_URI points at; the current directory is where its files go."""
    monkeypatch.chdir(Path(sqlite_store.removeprefix("sqlite:///")).parent)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_store)
    import mlflow  # takes seconds, and most tests need none

    # Clients made without a URI go where the last `set_tracking_uri` of this process says.
    mlflow.set_tracking_uri(sqlite_store)
    return sqlite_store


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL with the databases `mlflow` and `prefect`."""
    with servers.postgres(("mlflow", "prefect")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_store(tmp_path_factory):
    """An S3-compatible store with the buckets `dvc` and `mlflow`."""
    with servers.s3(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory, postgres, s3_store):
    """The address of an MLflow server on PostgreSQL, with its artifacts in the S3 store."""
    database = postgres.uri("mlflow", driver="postgresql+psycopg")
    with servers.mlflow_server(tmp_path_factory.mktemp("mlflow-server"), database, s3_store) as address:
        yield address


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory, postgres):
    """The address of a Prefect server on PostgreSQL, which flows of this process run against."""
    from prefect.context import refresh_global_settings_context

    database = postgres.uri("prefect", driver="postgresql+asyncpg")
    with (
        servers.prefect_server(tmp_path_factory.mktemp("prefect-server"), database) as address,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PREFECT_API_URL", address)
        refresh_global_settings_context()  # Prefect read the environment when it was imported
        yield address


# A test that uses one of these waits for a server, for a database's first use, or for vLLM.
SLOW_FIXTURES = {"compressed", "mlflow_server", "mlflow_store", "postgres", "prefect_server", "s3_store"}
# All of what is in these takes long: whole pipelines, engines, kills, every family.
SLOW_FILES = {
    "test_adding_a_step",
    "test_benchmarks",
    "test_distributed",
    "test_end_to_end",
    "test_evaluation",
    "test_families",
    "test_faults",
    "test_foresight",
    "test_hub_sources",
    "test_hybrids",
    "test_ledger",
    "test_local_sources",
    "test_multimodal",
    "test_older_versions",
    "test_package_sources",
    "test_prune_stage",
    "test_remote_code",
    "test_search_methods",
    "test_search_stage",
    "test_serving",
    "test_stability",
    "test_vllm_engines",
    "test_vllm_front_ends",
    "test_vllm_plugin",
}


# Begun first, so that no worker is left with one of these when the others have nothing more to do.
LONGEST = (
    "test_end_to_end",
    "test_deployment",
    "test_faults",
    "test_vllm_engines",
    "test_distributed",
    "test_flow",
    "test_serving",
    "test_families",
    "test_vllm_front_ends",
    "test_search_methods",
    "test_search_stage",
    "test_servers",
    "test_vllm_plugin",
    "test_hybrids",
    "test_collect",
    "test_promote",
)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Iterator[int]:
    """One more than there are cores: a quarter of the time tests wait, for servers, schedules and engines."""
    return (yield) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep what the test files import out of garbage collections, each of which takes a second to look through it."""
    with large_imports():
        collected = yield
        freeze_imports()
    return collected


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first. Mark what `make test-fast` leaves out; a test can also say so by its mark."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.path.stem in SLOW_FILES or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
