"""Bad input of every kind, through the commands: one line, a status that is not 0, and nothing written."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import TEXT, random_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_sources import write_gguf

from finercut import params, paths, sources
from finercut.tokens import load_tokens
from finercut.trajectory import read_trajectory
from finercut.weights import safetensors_shapes
from pipelines import calibrate, fetch, prune, search
from pipelines.cli import main

ROOT = Path(__file__).parents[1]
VALID = yaml.safe_load((ROOT / "params.yaml").read_text())


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, tiny_model) -> Path:
    """A project in which everything up to `prune` has run."""
    root = tmp_path_factory.mktemp("compressed")
    shutil.copytree(tiny_model, root / "mine")
    (root / "text.txt").write_text("\n\n".join(TEXT * 6))
    changed = copy.deepcopy(VALID)
    changed["fetch"]["source"] = {"kind": "local", "path": "mine"}
    changed["calibrate"] |= {"source": {"kind": "files", "paths": ["text.txt"]}, "n_samples": 2, "n_tokens": 16}
    changed["calibrate"] |= {"n_held_out_samples": 2}
    changed["search"] |= {"removals": 4, "dtype": "float32", "device": "cpu"}
    changed["prune"]["budget"]["amount"] = 2
    changed["evaluate"] |= {"tasks": [], "device": "cpu"}
    (root / "params.yaml").write_text(yaml.safe_dump(changed))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in (fetch, calibrate, search, prune):
            stage.run(params.load())
    shutil.rmtree(root / paths.WORK)
    return root


@pytest.fixture
def project(compressed, tmp_path, monkeypatch) -> Path:
    """A copy of it, and the current directory."""
    root = shutil.copytree(compressed, tmp_path / "project")
    monkeypatch.chdir(root)
    logging.getLogger("finercut").setLevel(logging.INFO)
    return root


def files(root: Path) -> dict[Path, bytes]:
    """All but what a stage keeps for its own next attempt."""
    found = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
    return {p: (root / p).read_bytes() for p in found if not p.is_relative_to(paths.WORK)}


def refused(*arguments: str) -> str:
    """The one line that the command says about it."""
    before = files(Path.cwd())
    said = CliRunner().invoke(main, arguments)
    if said.exception is not None and not isinstance(said.exception, SystemExit):
        raise said.exception
    assert said.exit_code == 1, said.output
    (line,) = said.stderr.splitlines()
    assert line.startswith(f"finercut {arguments[0]}: "), line
    assert 20 < len(line) < 600, line
    assert "pydantic" not in line
    assert files(Path.cwd()) == before
    return line


def set_params(**changes: object) -> None:
    """Dotted paths, with `__` for the dot, in params.yaml."""
    values = yaml.safe_load(Path("params.yaml").read_text())
    for name, value in changes.items():
        *sections, field = name.split("__")
        section = values
        for key in sections:
            section = section[key]
        section[field] = value
    Path("params.yaml").write_text(yaml.safe_dump(values))


# Params

PARAMS_FILES = {
    "empty": b"",
    "null": b"null",
    "list": b"- fetch\n- calibrate\n",
    "text": b"compress my model, please",
    "number": b"4",
    "unfinished": b"fetch: {source: {kind: local, path: mine}",
    "tabs": b"fetch:\n\tsource: x\n",
    "binary": bytes(range(256)),
    "utf-16": "fetch: {}".encode("utf-16"),
    "latin-1": "fetch: caf\xe9".encode("latin-1"),
    "object": b"fetch: !!python/object/apply:os.system ['touch owned']\n",
    "two documents": b"fetch: {}\n---\ncalibrate: {}\n",
    "unknown anchor": b"fetch: *nothing\n",
    "unhashable key": b"{[1, 2]: 3}\n",
    "number as key": b"1: 2\n",
    "wrong tag": b"fetch: !!bool maybe\n",
    "no time": b"fetch: !!timestamp now\n",
    "no day": b"fetch: 2026-02-30\n",
    "deep": b"[" * 2000,
    "duplicate key": (ROOT / "params.yaml").read_bytes() + b"\nprune: {budget: {unit: sublayers, amount: 0.5}}\n",
    "recursive": b"fetch: &a {source: *a}\n",
}


@pytest.mark.parametrize("content", PARAMS_FILES.values(), ids=PARAMS_FILES)
def test_a_params_file_that_is_none(project, content):
    Path("params.yaml").write_bytes(content)
    assert "params.yaml" in refused("params")
    assert not Path("owned").exists()


PARAMS = [
    ("fetch", None),
    ("fetch.source", "mine"),
    ("fetch.source", {}),
    ("fetch.source", {"kind": "ftp", "path": "mine"}),
    ("fetch.source", {"kind": "local"}),
    ("fetch.source", {"kind": "local", "path": 3}),
    ("fetch.source", {"kind": "hub", "repository": "org/name"}),
    ("fetch.source", {"kind": "hub", "repository": "../../etc", "revision": "main"}),
    ("fetch.source", {"kind": "hub", "repository": "https://huggingface.co/org/name", "revision": "main"}),
    ("fetch.source", {"kind": "hub", "repository": "org/name", "revision": 1234567}),
    ("fetch.source", {"kind": "hub", "repository": "org/name", "revision": ""}),
    ("fetch.source.version", 0.1),
    ("fetch.source.name", ""),
    ("fetch.source.name", "x\n--index-url http://127.0.0.1:9/"),
    ("fetch.source.name", "--index-url"),
    ("fetch.source.name", "x @ file:///tmp/x.whl"),
    ("fetch.source.version", "1.0 --no-require-hashes"),
    ("fetch.source.version", ">=1"),
    ("fetch.source.sha256", "bcc81830"),
    ("fetch.source.sha256", 64 * "Z"),
    ("fetch.source.dtype", "int8"),
    ("calibrate.source", {"kind": "files", "paths": []}),
    ("calibrate.source", {"kind": "files", "paths": "text.txt"}),
    ("calibrate.source", {"kind": "hub", "dataset": "org/name", "revision": "main"}),
    ("calibrate.n_samples", 0),
    ("calibrate.n_samples", -1),
    ("calibrate.n_samples", 2.5),
    ("calibrate.n_samples", True),
    ("calibrate.n_samples", "8"),
    ("calibrate.n_samples", None),
    ("calibrate.n_tokens", 1),
    ("calibrate.shuffle_seed", "random"),
    ("search.divergence", "cosine"),
    ("search.candidates", ["attention"]),
    ("search.protect", "0.block"),
    ("search.protect", [0.5]),
    ("search.exclude", 1.0),
    ("search.exclude", float("nan")),
    ("search.removals", 0),
    ("search.removals", 1.5),
    ("search.removals", float("nan")),
    ("search.removals", True),
    ("search.dtype", "fp32"),
    ("search.device", 0),
    ("prune.budget", {"unit": "sublayers"}),
    ("prune.budget", {"unit": "layers", "amount": 0.25}),
    ("prune.budget", {"unit": "parameters", "amount": 3}),
    ("prune.budget", {"unit": "kv_cache", "amount": -0.1}),
    ("prune.budget.amount", "25%"),
    ("evaluate.tasks", {"name": "piqa", "metric": "acc"}),
    ("evaluate.tasks", [{"name": "piqa"}]),
    ("evaluate.tasks", [{"name": "piqa", "metric": "acc", "n_shot": 5}]),
    ("evaluate.tasks", [{"name": "piqa", "metric": "acc", "limit": 0}]),
    ("evaluate.seed", -1),
    ("evaluate.seed", 2**32),
    ("evaluate.batch_size", 0),
    ("evaluate.parity_tolerance", 0),
    ("evaluate.parity_tolerance", float("inf")),
    ("throughput", VALID["throughput"] | {"max_model_len": 64}),
    ("throughput.kv_cache_gib", float("inf")),
    ("throughput.enforce_eager", "perhaps"),
    ("throughput.n_rounds", 1),
    ("register.name", "team/model"),
    ("register.name", "model-0.25"),
    ("register.name", "a' or name != '"),
    ("register.name", ""),
    ("register.min_retention", "high"),
    ("flow.experiment", ""),
    ("flow.retries", {"fetsh": 2}),
    ("flow.retries", {"fetch": -1}),
    ("flow.retry_delay_s", float("inf")),
    ("flow.timeout_s", {"search": 0}),
    ("flow.timeout_s", 3600),
    ("flow.timeouts", {"search": 1}),
    ("registry", {}),
]


@pytest.mark.parametrize(("field", "value"), PARAMS, ids=[f"{field}={value!r}"[:60] for field, value in PARAMS])
def test_a_field_that_cannot_be(project, field, value):
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    set_params(**{field.replace(".", "__"): value})
    assert f"{field}: " in refused("params") or f"{field}." in refused("params")


def _leaves(values: object, path: tuple = ()) -> list[tuple]:
    if isinstance(values, dict) and values:
        return [leaf for key, value in values.items() for leaf in _leaves(value, (*path, key))]
    return [path]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def complaint(action: Callable[..., object], file: Path) -> str:
    """What `action` says is wrong with `file`, without it; nothing if it takes it."""
    try:
        action(file)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        return str(error)
    return f"{file} is good"


def names(file: Path, said: str) -> bool:
    return str(file) in said and len(said.splitlines()) == 1 and len(said) < 1000


@given(path=st.sampled_from(_leaves(VALID)), value=JUNK)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field_is_taken_or_named(tmp_path, path, value):
    values = copy.deepcopy(VALID)
    section = values
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    assert names(file, complaint(params.load, file))


@given(content=st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_params_are_refused_in_one_line(tmp_path, content):
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    assert names(file, complaint(params.load, file))


# Trajectories


def edited(change: Callable[[list[dict]], object]) -> Callable[[], None]:
    """The trajectory's lines changed as JSON."""

    def damage() -> None:
        lines = [json.loads(line) for line in paths.TRAJECTORY.read_text().splitlines()]
        change(lines)
        paths.TRAJECTORY.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return damage


def field(line: int, name: str, value: object) -> Callable[[], None]:
    return edited(lambda lines: lines[line].update({name: value}))


def written(content: bytes) -> Callable[[], None]:
    return lambda: paths.TRAJECTORY.write_bytes(content)


TRAJECTORIES: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (paths.TRAJECTORY.unlink, "run `finercut search` first"),
    "empty": (written(b""), "is empty"),
    "binary": (written(bytes(range(256))), "trajectory.jsonl"),
    "utf-16": (written("{}".encode("utf-16")), "trajectory.jsonl"),
    "a list": (written(b"[]\n"), "trajectory.jsonl:1: not a trajectory's provenance"),
    "a model": (written(b'{"model_type": "llama"}\n'), "trajectory.jsonl:1"),
    "deep": (written(b"[" * 100_000), "trajectory.jsonl:1"),
    "no provenance": (edited(lambda lines: lines.pop(0)), "trajectory.jsonl:1"),
    "no removals": (edited(lambda lines: lines.__delitem__(slice(1, None))), "raise search.removals"),
    "too short": (edited(lambda lines: lines.pop(2) and lines.__delitem__(slice(2, None))), "raise search.removals"),
    "torn": (lambda: os.truncate(paths.TRAJECTORY, paths.TRAJECTORY.stat().st_size - 20), "trajectory.jsonl:5"),
    "blank line": (lambda: paths.TRAJECTORY.write_text(paths.TRAJECTORY.read_text() + "\n"), "trajectory.jsonl:6"),
    "two in one": (lambda: paths.TRAJECTORY.write_text(paths.TRAJECTORY.read_text() * 2), "trajectory.jsonl:6"),
    "a step left out": (edited(lambda lines: lines.pop(2)), "step 3"),
    "a step twice": (edited(lambda lines: lines.insert(2, lines[1])), "step 1"),
    "steps swapped": (edited(lambda lines: lines.reverse()), "trajectory.jsonl:1"),
    "a sublayer twice": (edited(lambda lines: lines[2].update(sublayer=lines[1]["sublayer"])), "trajectory.jsonl:3"),
    "a sublayer of a block gone": (field(2, "sublayer", "0.block"), "trajectory.jsonl:"),
    "no such kind": (field(1, "sublayer", "2.attn"), "trajectory.jsonl:2"),
    "no such block": (field(1, "sublayer", "9.mlp"), "trajectory.jsonl:2"),
    "a negative block": (field(1, "sublayer", "-1.mlp"), "trajectory.jsonl:2"),
    "sublayer null": (field(1, "sublayer", None), "trajectory.jsonl:2: not a removal: sublayer"),
    "divergence a word": (field(1, "divergence", "small"), "trajectory.jsonl:2: not a removal: divergence"),
    "divergence NaN": (field(1, "divergence", "NaN"), "trajectory.jsonl:2: not a removal: divergence"),
    "step zero": (field(1, "step", 0), "trajectory.jsonl:2"),
    "step a share": (field(1, "step", 1.5), "trajectory.jsonl:2: not a removal: step"),
    "unknown field": (field(1, "loss", 1.0), "trajectory.jsonl:2: not a removal: loss"),
    "unknown provenance": (field(0, "seed", 1), "trajectory.jsonl:1"),
    "no blocks": (field(0, "n_blocks", 0), "trajectory.jsonl:1"),
    "a billion blocks": (field(0, "n_blocks", 10**9), "trajectory.jsonl:1"),
    "other number of blocks": (field(0, "n_blocks", 5), "a model of 5 blocks"),
    "other candidates": (field(0, "candidates", "heads"), "trajectory.jsonl:1"),
    "protects nothing known": (field(0, "protect", ["head"]), "trajectory.jsonl:1"),
    "other model": (field(0, "model_sha256", 64 * "0"), "run `finercut search` again"),
}


@pytest.mark.parametrize(("damage", "message"), TRAJECTORIES.values(), ids=TRAJECTORIES)
def test_a_trajectory_that_cannot_be_pruned_by(project, damage, message):
    damage()
    assert message in refused("prune")


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with a piece cut out, overwritten or put in."""
    piece = st.binary(max_size=12) | st.sampled_from([b"NaN", b"null", b"-1", b"1e999", b'"', b"{", b"}", b"[", b"\n"])
    place = st.integers(0, len(content))
    return st.builds(lambda at, n, new: content[:at] + new + content[at + n :], place, st.integers(0, 40), piece)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_trajectory_is_read_as_one_or_refused_in_one_line(compressed, tmp_path, data):
    file = tmp_path / "trajectory.jsonl"
    file.write_bytes(data.draw(mutated((compressed / paths.TRAJECTORY).read_bytes())))
    assert names(file, complaint(read_trajectory, file))


# Checkpoints


def config(**changes: object) -> Callable[[Path], None]:
    """Changes of a model's config.json; `...` takes a key out."""

    def damage(directory: Path) -> None:
        file = directory / "config.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    return damage


def content(name: str, written: bytes | str) -> Callable[[Path], None]:
    return lambda d: (d / name).write_bytes(written if isinstance(written, bytes) else written.encode())


def header(change: Callable[[dict], object], data: bytes | None = None) -> Callable[[Path], None]:
    """The header of model.safetensors changed as JSON, its tensors left as they are, or replaced."""

    def damage(directory: Path) -> None:
        file = directory / "model.safetensors"
        whole = file.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8 : 8 + length])
        changed = change(entries)
        text = json.dumps(entries if changed is None else changed).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + (whole[8 + length :] if data is None else data))

    return damage


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors", {"format": "pt"})

    return damage


def index(weight_map: object) -> Callable[[Path], None]:
    """Weights in a shard of their own, named by an index."""

    def damage(directory: Path) -> None:
        shard = "model-00001-of-00001.safetensors"
        (directory / "model.safetensors").rename(directory / shard)
        named = dict.fromkeys(load_file(directory / shard), shard)
        value = weight_map(named) if callable(weight_map) else weight_map
        (directory / "model.safetensors.index.json").write_text(json.dumps(value))

    return damage


def nothing(_: Path) -> None:
    pass


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config not JSON": (content("config.json", "{"), "config.json"),
    "config empty": (content("config.json", ""), "config.json"),
    "config binary": (content("config.json", bytes(range(256))), "config.json"),
    "config a list": (content("config.json", "[]"), "config.json"),
    "config a number": (content("config.json", "4"), "config.json"),
    "config deep": (content("config.json", "[" * 100_000), "config.json"),
    "no model_type": (config(model_type=...), "model_type"),
    "model_type null": (config(model_type=None), "model_type"),
    "model_type a list": (config(model_type=["llama"]), "model_type"),
    "model_type unknown": (config(model_type="camel"), "is a camel model"),
    "blocks a word": (config(num_hidden_layers="four"), "num_hidden_layers"),
    "blocks null": (config(num_hidden_layers=None), "num_hidden_layers"),
    "blocks negative": (config(num_hidden_layers=-4), "num_hidden_layers"),
    "blocks zero": (config(num_hidden_layers=0), "num_hidden_layers"),
    "more blocks than weights": (config(num_hidden_layers=5), "layers.4.input_layernorm.weight is missing (9 so)"),
    "a billion blocks": (config(num_hidden_layers=10**9), "do not fit"),
    "fewer blocks than weights": (
        config(num_hidden_layers=3),
        "weight is not in the model (9 so)",
    ),
    "heads zero": (config(num_attention_heads=0), "config"),
    "heads that do not divide": (config(num_attention_heads=3, head_dim=None), "config"),
    "other width": (config(hidden_size=64), "is of another shape"),
    "width a word": (config(hidden_size="wide"), "hidden_size"),
    "other vocabulary": (config(vocab_size=500), "do not fit"),
    "vocabulary negative": (config(vocab_size=-1), "vocab_size"),
    "context null": (config(max_position_embeddings=None), "max_position_embeddings"),
    "context zero": (config(max_position_embeddings=0), "max_position_embeddings"),
    "no such activation": (config(hidden_act="magic"), "magic"),
    "no such dtype": (config(dtype="float31"), "config"),
    "no such rope": (config(rope_parameters={"rope_type": "knot"}), "config"),
    "rope a list": (config(rope_parameters=[1]), "config"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "is quantised"),
    "pruned already": (config(model_type="finercut_llama"), "take the whole one"),
    "other family": (config(model_type="gpt2"), "is missing (53 so)"),
    "weights empty": (content("model.safetensors", ""), "model.safetensors is not a safetensors file"),
    "weights text": (content("model.safetensors", "version https://git-lfs.github.com/spec/v1\n" * 9), "safetensors"),
    "weights a zip": (content("model.safetensors", b"PK\3\4" + bytes(200)), "is not a safetensors file"),
    "weights cut": (lambda d: os.truncate(d / "model.safetensors", 100_000), "cut short or damaged"),
    "weights longer": (lambda d: (d / "model.safetensors").open("ab").write(b"x"), "cut short or damaged"),
    "header a list": (header(lambda h: []), "is not a safetensors file"),
    "header's entry a number": (header(lambda h: h.update({Q_PROJ: 3})), "is not a safetensors file"),
    "no offsets": (header(lambda h: h[Q_PROJ].pop("data_offsets")), "is not a safetensors file"),
    "no shape": (header(lambda h: h[Q_PROJ].pop("shape")), "is not a safetensors file"),
    "one offset": (header(lambda h: h[Q_PROJ].update(data_offsets=[0])), "is not a safetensors file"),
    "offsets words": (header(lambda h: h[Q_PROJ].update(data_offsets=["a", "b"])), "is not a safetensors file"),
    "offsets backwards": (header(lambda h: h[Q_PROJ]["data_offsets"].reverse()), "is not a safetensors file"),
    "offsets overlap": (header(lambda h: h[Q_PROJ].update(data_offsets=[0, 65536])), "is not a safetensors file"),
    "offsets negative": (header(lambda h: h[Q_PROJ].update(data_offsets=[-65536, 0])), "is not a safetensors file"),
    "shape not of the size": (header(lambda h: h[Q_PROJ].update(shape=[128, 127])), "is not a safetensors file"),
    "shape negative": (header(lambda h: h[Q_PROJ].update(shape=[-128, -128])), "is not a safetensors file"),
    "dtype unknown": (header(lambda h: h[Q_PROJ].update(dtype="F31")), "is not a safetensors file"),
    "dtype a number": (header(lambda h: h[Q_PROJ].update(dtype=32)), "is not a safetensors file"),
    "no tensors": (header(lambda h: {}, b""), "do not fit the config"),
    "tensor gone": (tensors(lambda t: t.pop(Q_PROJ)), Q_PROJ),
    "tensor too many": (tensors(lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(3)})), "layers.9"),
    "tensor misshapen": (tensors(lambda t: t.update({Q_PROJ: torch.ones(128, 64)})), Q_PROJ),
    "tensor of integers": (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].long()})), f"{Q_PROJ} is not floating-point"),
    "tensor of NaN": (tensors(lambda t: t[Q_PROJ].fill_(float("nan"))), Q_PROJ),
    "one infinity": (tensors(lambda t: t[Q_PROJ].view(-1)[77].fill_(float("inf"))), Q_PROJ),
    "index not JSON": (lambda d: (index({})(d), content("model.safetensors.index.json", "{")(d)), "index.json"),
    "index a list": (index([]), "index.json"),
    "index without a map": (index({"metadata": {}}), "index.json"),
    "index's map a list": (index({"weight_map": ["a"]}), "index.json"),
    "index names no shard": (
        index(lambda m: {"weight_map": m | {Q_PROJ: "model-00002-of-00002.safetensors"}}),
        "shard",
    ),
    "index leaves the folder": (index(lambda m: {"weight_map": m | {Q_PROJ: "../../secret.safetensors"}}), "shard"),
    "tokenizer not JSON": (content("tokenizer.json", "{"), "tokenizer"),
    "tokenizer empty": (content("tokenizer.json", ""), "tokenizer"),
    "tokenizer of nothing": (content("tokenizer.json", "{}"), "tokenizer"),
    "tokenizer a list": (content("tokenizer.json", "[]"), "tokenizer"),
    "tokenizer unknown": (content("tokenizer.json", '{"model": {"type": "BPE2"}}'), "tokenizer"),
    "tokenizer config not JSON": (content("tokenizer_config.json", "{"), "tokenizer"),
    "tokenizer config a list": (content("tokenizer_config.json", "[]"), "tokenizer"),
    "generation config not JSON": (content("generation_config.json", "{"), "generation_config.json"),
    "only a pickle": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "can run code when loaded"),
    "only a checkpoint of torch": (lambda d: (d / "model.safetensors").rename(d / "model.pt"), "can run code"),
    "a folder for weights": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()),
        "no weights",
    ),
    "nothing": (shutil.rmtree, "no directory"),
}


@pytest.mark.parametrize(("damage", "message"), MODELS.values(), ids=MODELS)
def test_a_model_that_is_not_taken(project, damage, message):
    damage(Path("mine"))
    assert message in refused("fetch")


def test_a_model_in_good_order_is_taken(project):
    assert CliRunner().invoke(main, ["fetch"]).exit_code == 0


def test_weights_beside_the_language_model_are_let_be(project, caplog):
    tensors(lambda t: t.update({"vision.layers.0.weight": torch.ones(3)}))(Path("mine"))
    assert CliRunner().invoke(main, ["fetch"]).exit_code == 0
    assert "1 tensors are not used, the first is vision.layers.0.weight" in caplog.text


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_weights_is_found_in_their_header_or_changes_only_numbers(compressed, tmp_path, data):
    whole = (compressed / "mine" / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    file = tmp_path / "model.safetensors"
    file.write_bytes(data.draw(mutated(whole[:length])) + whole[length:])
    assert names(tmp_path, complaint(safetensors_shapes, tmp_path))


@pytest.mark.parametrize(
    ("stage", "damage"),
    [(stage, damage) for stage in ("search", "prune", "evaluate") for damage in ("weights cut", "header a list")]
    + [(stage, "config a list") for stage in ("calibrate", "search", "prune", "evaluate")]
    + [(stage, "tensor gone") for stage in ("search", "evaluate")]
    + [("calibrate", damage) for damage in ("tokenizer empty", "tokenizer of nothing", "tokenizer config a list")],
)
def test_a_model_that_was_damaged_after_it_was_fetched(project, stage, damage):
    MODELS[damage][0](paths.MODEL)
    assert "artifacts/model" in refused(stage)


PRUNED: dict[str, tuple[Callable[[Path], object], str]] = {
    "config not JSON": (content("config.json", "{"), "config.json is not JSON"),
    "no config": (lambda d: (d / "config.json").unlink(), "no model in artifacts/pruned"),
    "not pruned": (config(model_type="llama"), "holds a llama model"),
    "nothing skipped": (config(per_layer_config=...), "weights and config.json do not belong together"),
    "skips a word": (config(per_layer_config="12"), "config"),
    "skips what it has": (
        config(per_layer_config={"0": {"skip": ["attention", "mlp"]}, "1": {"skip": ["attention", "mlp"]}}),
        "do not belong together",
    ),
    "skips every attention": (
        config(per_layer_config={str(i): {"skip": ["attention"]} for i in range(4)}),
        "every attention is removed",
    ),
    "no layout": (config(finercut=None), "finercut.layout"),
    "a layout that is none": (config(finercut={"layout": {"blocks": "nowhere"}}), "artifacts/pruned"),
    "weights cut": (lambda d: os.truncate(d / "model.safetensors", 100_000), "cut short or damaged"),
    "weights empty": (content("model.safetensors", ""), "is not a safetensors file"),
    "other weights": (lambda d: shutil.copy("mine/model.safetensors", d), "do not belong together"),
    "weights of NaN": (
        tensors(lambda t: [tensor.fill_(float("nan")) for tensor in t.values()]),
        "are not finite: the checkpoint is damaged",
    ),
}


@pytest.mark.parametrize(("damage", "message"), PRUNED.values(), ids=PRUNED)
def test_a_checkpoint_that_is_not_evaluated(project, damage, message):
    damage(paths.PRUNED)
    for report in (paths.PARITY, paths.report("evaluate")):
        assert not report.exists()
    assert message in refused("evaluate")


@pytest.mark.parametrize("damage", ["config not JSON", "no config", "skips a word"])
def test_a_checkpoint_that_cannot_be_inspected(project, damage):
    PRUNED[damage][0](paths.PRUNED)
    assert "artifacts/pruned" in refused("inspect", str(paths.PRUNED))


# Calibration


def stored(**changes: object) -> Callable[[], None]:
    """The token file with other tensors, their hashes recorded as if they were right."""

    def damage() -> None:
        found = load_tokens(paths.CALIBRATION)
        fields = {"calibration": found.calibration, "held_out": found.held_out} | changes
        shutil.rmtree(paths.CALIBRATION)
        paths.CALIBRATION.mkdir()
        recorded = {
            f"{name}_sha256": hashlib.sha256(
                f"{' '.join(map(str, windows.shape))}\n".encode() + windows.numpy().astype("<i8").tobytes()
            ).hexdigest()
            for name, windows in fields.items()
        }
        save_file(fields, paths.CALIBRATION / "tokens.safetensors", {"finercut": json.dumps(recorded)})

    return damage


def token_file(written: bytes) -> Callable[[], object]:
    return lambda: TOKENS.write_bytes(written)


def metadata(recorded: object) -> Callable[[], None]:
    def damage() -> None:
        save_file(load_file(TOKENS), TOKENS, recorded)

    return damage


TOKENS = paths.CALIBRATION / "tokens.safetensors"
TOKEN_FILES: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (TOKENS.unlink, "run `finercut calibrate` first"),
    "empty": (token_file(b""), "is not a token file"),
    "text": (token_file(b"1 2 3 4 5 6 7 8"), "is not a token file"),
    "cut": (lambda: os.truncate(TOKENS, TOKENS.stat().st_size - 8), "is not a token file"),
    "one bit": (lambda: TOKENS.write_bytes(TOKENS.read_bytes()[:-1] + b"\1"), "is damaged"),
    "a model": (lambda: shutil.copy("mine/model.safetensors", TOKENS), "is not a token file"),
    "no metadata": (metadata(None), "is not a token file"),
    "metadata not JSON": (metadata({"finercut": "{"}), "is not a token file"),
    "metadata a list": (metadata({"finercut": "[]"}), "is not a token file"),
    "no hashes": (metadata({"finercut": "{}"}), "is not a token file"),
    "one row": (stored(held_out=torch.arange(16)), "does not hold windows of tokens"),
    "no windows": (stored(held_out=torch.zeros(0, 16, dtype=torch.int64)), "does not hold windows of tokens"),
    "other numbers": (stored(calibration=torch.zeros(2, 16)), "does not hold windows of tokens"),
    "below zero": (stored(calibration=torch.full((2, 16), -1)), "does not hold windows of tokens"),
    "beyond the vocabulary": (stored(held_out=torch.full((2, 16), 400)), "token 400, the model knows 400"),
}


@pytest.mark.parametrize("stage", ["search", "evaluate"])
@pytest.mark.parametrize(("damage", "message"), TOKEN_FILES.values(), ids=TOKEN_FILES)
def test_a_token_file_that_is_none(project, stage, damage, message):
    damage()
    assert message in refused(stage)


def row(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


GOOD = "\n\n".join(TEXT * 6).encode()
TEXTS: dict[str, tuple[str, bytes, str]] = {
    "no such kind": ("text.pdf", GOOD, "is none of .txt, .jsonl, .parquet"),
    "no suffix": ("text", GOOD, "is none of .txt, .jsonl, .parquet"),
    "empty": ("text.txt", b"", "is empty"),
    "blank": ("text.txt", b" \n\n\t\n", "is empty"),
    "latin-1": ("text.txt", GOOD + b"caf\xe9 ", "is not UTF-8 (byte"),
    "utf-16": ("text.txt", GOOD.decode().encode("utf-16"), "is not UTF-8 (byte 0)"),
    "binary": ("text.txt", bytes(range(256)) * 8, "is not UTF-8 (byte"),
    "too short": ("text.txt", GOOD[:100], "give more text"),
    "one document": ("text.txt", GOOD.replace(b"\n\n", b" "), "that calibration does not use"),
    "not JSON": ("text.jsonl", row({"text": "a"}) + b"{text: b}\n", "line 2 is not JSON"),
    "deep": ("text.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    "a list": ("text.jsonl", row(["a"]), "line 1 has no column 'text'"),
    "a number": ("text.jsonl", row(4), "line 1 has no column 'text'"),
    "other column": ("text.jsonl", row({"content": "a"}), "has no column 'text', only content"),
    "column gone later": ("text.jsonl", row({"text": "a"}) + row({"body": "b"}), "line 2 has no column"),
    "null": ("text.jsonl", row({"text": None}), "row 1 holds NoneType"),
    "a number in it": ("text.jsonl", row({"text": "a"}) + row({"text": 4}), "row 2 holds int"),
    "half a character": ("text.jsonl", row({"text": TEXT[0]}) * 9 + b'{"text": "\\ud800"}\n', "row 10 holds half"),
    "torn": ("text.jsonl", row({"text": "a"}) + b'{"text": "b', "line 2 is not JSON"),
    "not parquet": ("text.parquet", GOOD, "is not a parquet file"),
    "parquet empty": ("text.parquet", b"", "is not a parquet file"),
    "parquet cut": ("text.parquet", b"PAR1" + bytes(40), "is not a parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_cannot_be_used(project, name, content, message):
    Path("text.txt").unlink()
    Path(name).write_bytes(content)
    set_params(calibrate__source={"kind": "files", "paths": [name]})
    assert message in refused("calibrate")


def parquet(columns: dict[str, list]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), "text.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": TEXT}, "has no column 'text', only content"),
        ({"text": [1, 2]}, "row 1 holds int"),
        ({"text": ["a", None]}, "row 2 holds NoneType"),
        ({"text": [["a"]]}, "row 1 holds list"),
        ({"text": [b"\xff"]}, "row 1 holds bytes"),
        ({}, "has no column 'text'"),
    ],
)
def test_a_parquet_file_without_text(project, columns, message):
    parquet(columns)
    set_params(calibrate__source={"kind": "files", "paths": ["text.parquet"]})
    assert message in refused("calibrate")


def test_a_parquet_file_whose_pages_are_damaged(project):
    parquet({"text": TEXT * 50})
    whole = bytearray(Path("text.parquet").read_bytes())
    whole[20:200] = bytes(180)
    Path("text.parquet").write_bytes(whole)
    set_params(calibrate__source={"kind": "files", "paths": ["text.parquet"]})
    assert "text.parquet" in refused("calibrate")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibrate__n_tokens": 257}, "calibrate.n_tokens = 257 is more than the model's context of 256"),
        ({"calibrate__n_samples": 10**9}, "give more text"),
        ({"calibrate__source": {"kind": "files", "paths": ["."]}}, ". is none of"),
        ({"calibrate__source": {"kind": "files", "paths": ["no.txt"]}}, "no file no.txt"),
        ({"calibrate__source": {"kind": "package", "name": "no-such-text", "version": "1"}}, "pip install no-such"),
        ({"calibrate__source": {"kind": "package", "name": "click", "version": "0"}}, "is installed, not 0"),
    ],
)
def test_a_calibration_that_cannot_be_cut(project, change, message):
    set_params(**change)
    assert message in refused("calibrate")


# Files of GGUF


GGUFS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"version https://git-lfs.github.com/spec/v1\n",
    "cut in its header": lambda whole: whole[:60],
    "cut in its tensors": lambda whole: whole[:-1000],
    "version of the future": lambda whole: whole[:4] + struct.pack("<I", 99) + whole[8:],
    "more tensors than there are": lambda whole: whole[:8] + struct.pack("<Q", 2**60) + whole[16:],
    "more fields than there are": lambda whole: whole[:16] + struct.pack("<Q", 2**60) + whole[24:],
    "a key without end": lambda whole: whole[:24] + struct.pack("<Q", 2**60) + whole[32:],
    "other architecture": lambda whole: whole.replace(b"llama", b"camel"),
    "no tokenizer": lambda whole: whole.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.nothin"),
}


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory, tokenizer) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, random_llama(), tokenizer)
    return file.read_bytes()


@pytest.mark.parametrize("damage", GGUFS.values(), ids=GGUFS)
def test_a_gguf_file_that_cannot_be_read(good_gguf, tmp_path, damage):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(damage(good_gguf))
    (tmp_path / "model").mkdir()
    said = complaint(lambda gguf: sources.dequantise(gguf, "float32", tmp_path / "model"), file)
    assert "tiny.gguf" in said
    assert "is good" not in said
    assert len(said.splitlines()) == 1


# Reports


@pytest.mark.parametrize("written", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"note": "good"}', b"[" * 100_000])
@pytest.mark.parametrize("stage", ["search", "summary", "register"])
def test_a_report_that_is_none(project, stage, written):
    name = "evaluate" if stage == "register" else "fetch"
    paths.report(name).write_bytes(written)
    assert f"reports/{name}.json" in refused(stage)


# Where it runs


@pytest.mark.parametrize("stage", ["search", "evaluate"])
@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta", "cpu:x", "cuda:-1"])
def test_a_device_that_is_not_here(project, stage, device):
    set_params(search__device=device, evaluate__device=device)
    assert f"no device {device!r} here" in refused(stage)
