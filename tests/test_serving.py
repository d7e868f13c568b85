"""Real vLLM engines on the tiny model, each in a process of its own, as few as the claims allow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import random_llama
from safetensors.torch import load_file, save_file
from servers import open_to_others

from finercut.checkpoint.records import Claim, ProveReport
from finercut.checkpoint.writing import write_pruned
from finercut.model.directory import ModelDirectory
from finercut.model.fitted_costs import costs_with
from finercut.model.loading import load_whole
from finercut.model.masking import masked
from finercut.model.records import CostsReport
from finercut.serving import vllm_engine
from finercut.serving.settings import Throughput
from finercut.serving.vllm_engine import Continuation, largest_difference
from finercut.sublayers import Sublayer
from finercut.tokens import Tokens, write_tokens
from pipelines import costs, paths, prove, prove_whole, throughput
from pipelines.params import load

ROOT = Path(__file__).parents[1]
REMOVED = [Sublayer(0, "attention"), Sublayer(2, "attention"), Sublayer(2, "mlp"), Sublayer(3, "mlp")]
SETTINGS = Throughput(
    input_tokens=8,
    output_tokens=4,
    concurrency=2,
    n_warmups=1,
    n_rounds=2,
    dtype="float32",
    max_model_len=128,  # a block of the KV cache on CPU
    kv_cache_gib=0.0625,
    enforce_eager=True,
    interleave=True,
)


@pytest.fixture(scope="module")
def pruned(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("serving") / "pruned"
    write_pruned(tiny_model, REMOVED, directory, {}, "")
    return directory


def test_vllm_computes_what_the_masked_whole_model_does_when_compiled(pruned, tiny_model, tokens, monkeypatch):
    # Compiled by dynamo alone: inductor would want a C++ compiler on the machine
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    windows = tokens[:2].tolist()
    compiled = SETTINGS.model_copy(update={"enforce_eager": False})
    with vllm_engine.engine(pruned, compiled, one_process=True) as engine:
        served = engine.continuations(windows)
    assert [c.tokens[:24] for c in served] == windows
    assert [len(c.tokens) for c in served] == [24 + vllm_engine.N_GENERATED] * 2
    assert {len(given) >= vllm_engine.N_LIKELIEST for c in served for given in c.logprobs} == {True}
    whole = load_whole(tiny_model, torch.float32)
    with masked(whole, REMOVED):
        assert largest_difference(served, whole) < 1e-4
    with masked(whole, REMOVED[:-1]):
        assert largest_difference(served, whole) > 0.1


@pytest.fixture
def temporary(monkeypatch):
    """A folder for temporary files; not under pytest's, whose names are too long for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_a_served_model_is_timed_caches_only_its_kept_attentions_and_leaves_no_socket(pruned, temporary):
    def sockets():
        return [path for path in temporary.rglob("*") if path.is_socket()]

    with vllm_engine.engine(pruned, SETTINGS) as engine:
        rounds = [engine.round(seed, SETTINGS) for seed in range(2)]
        rate = SETTINGS.model_copy(update={"request_rate": 12.0, "n_requests": 6})
        arrivals = engine.round(0, rate)
        # 2 of 4 attentions, keys and values, 2 heads of 32 float32 each
        n_tokens = 0.0625 * 2**30 / (2 * 2 * 2 * 32 * 4)
        assert engine.kv_cache_tokens == pytest.approx(n_tokens, rel=0.01)
        assert "cores" in engine.hardware
        assert open_to_others(psutil.Process(engine.process.pid)) == []
        assert sockets()
    assert not sockets()
    for measured in rounds:
        # A round lasts as long as its first tokens and the three after them, and a little
        seconds = 2 * 4 / measured.output_tokens_per_s
        assert 0.2 * seconds < measured.ttft_s + 3 * measured.tpot_s < 1.1 * seconds
    # Six requests at 12 a second are half a second's, however fast they are served
    assert arrivals.output_tokens_per_s < 12 * 4
    assert 0 < arrivals.ttft_s < 0.5


def test_a_failed_engine_says_why(pruned, tmp_path):
    directory = tmp_path / "damaged"
    directory.mkdir()
    for file in pruned.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    cause = r"damaged.*missing: model\.layers\.1\.self_attn\.k_proj\.weight"
    with vllm_engine.engine(directory, SETTINGS, one_process=True) as engine, pytest.raises(RuntimeError, match=cause):
        engine.continuations([[5, 6, 7]])


def test_nothing_outlives_the_process_that_started_it(pruned, tmp_path, temporary):
    script = tmp_path / "start.py"
    script.write_text(
        # As in a terminal: what runs in the background of a shell is started with interrupts ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from finercut.serving.settings import Throughput\n"
        "from finercut.serving.vllm_engine import engine as start\n"
        f"settings = Throughput.model_validate({SETTINGS.model_dump()!r})\n"
        f"with start(Path({str(pruned)!r}), settings) as engine:\n"
        "    engine.round(0, settings)\n"
    )
    ends = {
        sign: psutil.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
        # One that Python lets the process clean up after, and one that it does not.
        for sign in (signal.SIGINT, signal.SIGKILL)
    }
    groups = {}
    for sign, process in ends.items():
        (engine,) = wait_for(process.children)
        groups[sign] = [engine, *wait_for(lambda engine=engine: vllm_children(engine))]
        os.kill(process.pid, sign)
        process.wait(timeout=30)
    for sign, group in groups.items():
        _, alive = psutil.wait_procs(group, timeout=30)
        running = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        assert not running, f"after {sign.name}"
    assert not list(temporary.glob("vllm-*"))


def vllm_children(engine):
    """vLLM's own processes, as soon as they are spawned."""
    return [
        process
        for process in psutil.process_iter(["ppid", "cmdline"])
        if process.info["ppid"] == engine.pid
        and any(mark in " ".join(process.info["cmdline"] or ()) for mark in ("spawn_main", "VLLM"))
    ]


def wait_for(found):
    deadline = time.monotonic() + 120
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_the_largest_difference_is_over_all_positions_and_tokens():
    model = random_llama()
    tokens = [5, 6, 7, 8]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0].double()
    exact = [
        {t: (row[t] - row.exp().sum().log()).item() for t in (n, 9)} for row, n in zip(logits, tokens[1:], strict=True)
    ]
    served = [Continuation(tokens, exact)]
    assert largest_difference(served, model) < 1e-5
    exact[1][9] -= 0.25
    assert largest_difference(served, model) == pytest.approx(0.25, abs=1e-5)
    exact[2][9] = float("nan")
    assert largest_difference(served, model) != largest_difference(served, model)


def test_the_first_error_in_the_log_is_the_cause():
    log = (
        "(EngineCore pid=7) WARNING 01-01 00:00:00 [base.py:1] ValueError: harmless\n"
        "(EngineCore pid=7) ERROR 01-01 00:00:01 [core.py:2] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 01-01 00:00:01 [core.py:2] torch.OutOfMemoryError: tried to allocate 20 GiB\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert vllm_engine.cause(log) == "torch.OutOfMemoryError: tried to allocate 20 GiB"
    assert vllm_engine.cause("one\n\ntwo\n") == "one two"


def test_the_cause_is_one_line_however_vllm_puts_it():
    bare = (
        "ERROR [core.py:2]     assert not config.scale_attn_by_inverse_layer_idx\n"
        "ERROR [core.py:2]            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^\n"
        "ERROR [core.py:2] AssertionError\n"
        "RuntimeError: Engine core initialization failed\n"
    )
    assert vllm_engine.cause(bare) == "AssertionError: assert not config.scale_attn_by_inverse_layer_idx"
    invalid = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        f"  Value error, Model architectures ['New'] are not supported. Supported: {['Old'] * 1000}\n"
    )
    cause = vllm_engine.cause(invalid)
    assert cause.startswith("Model architectures ['New'] are not supported. Supported: ['Old', 'Old'")
    assert len(cause) == vllm_engine.N_CHARACTERS + len(" ...")


def test_missing_vllm_names_the_extras_to_install(monkeypatch):
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'finercut\[cuda\]', or 'finercut\[cpu\]'"):
        vllm_engine.installed()


@pytest.fixture
def stages(pruned, tiny_model, tokens, tmp_path, monkeypatch):
    """Runs a stage on the tiny models with some of its settings changed; no engine starts before a check fails."""
    monkeypatch.chdir(tmp_path)
    for path, target in (
        (paths.MODEL, tiny_model),
        (paths.PRUNED, pruned),
        (paths.HEALED, pruned),
        (paths.QUANTISED, pruned),
    ):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target)
    paths.CALIBRATION.mkdir()
    write_tokens(paths.CALIBRATION, Tokens(tokens[:4], tokens[4:]), {})
    proved(holds=True)
    whole = load(ROOT / "params.yaml").model_copy(update={"throughput": SETTINGS})

    def run(module, **changes):
        section = module.__name__.rpartition(".")[2].removesuffix("_whole")
        changed = getattr(whole, section).model_copy(update=changes)
        return module.run(whole.model_copy(update={section: changed}))

    return run


def proved(holds):
    claim = Claim(name="prune", statement="equals", holds=holds, figures={}, limit=0.1)
    sha256 = ModelDirectory(paths.FINAL).weights_sha256
    report = ProveReport(sha256=sha256, claims=[claim], engine="vllm 0", torch_version="2", transformers_version="5")
    report.write(paths.report("prove"))


def test_a_checkpoint_whose_claim_does_not_hold_is_not_timed(stages):
    proved(holds=False)
    with pytest.raises(RuntimeError, match=r"reports/prove\.json has a claim that does not hold"):
        stages(throughput)
    paths.report("prove").unlink()
    with pytest.raises(FileNotFoundError, match="no reports/prove.json"):
        stages(throughput)


def test_a_missing_model_names_the_stage_that_makes_it(stages):
    paths.QUANTISED.unlink()
    with pytest.raises(FileNotFoundError, match="no model in artifacts/quantised: run `finercut quantise` first"):
        stages(throughput)


def test_vllm_that_computes_otherwise_fails_the_proof_and_the_report_says_so(stages):
    with pytest.raises(FileNotFoundError, match="run `finercut prove_whole` first"):
        stages(prove)
    said = r"not proved: serve_whole \(vLLM's log-probabilities.*take another version of it"
    with pytest.raises(RuntimeError, match=said):
        stages(prove_whole, log_probability_tolerance=1e-12)
    control = ProveReport.read(paths.report("prove_whole"))
    with pytest.raises(RuntimeError, match=r"reports/prove_whole\.json has a claim that does not hold"):
        stages(prove)
    held = [claim.model_copy(update={"holds": True}) for claim in control.claims]
    control.model_copy(update={"claims": held, "sha256": "0" * 64}).write(paths.report("prove_whole"))
    with pytest.raises(ValueError, match="is of another model than artifacts/model: run `finercut prove_whole` again"):
        stages(prove)
    control.model_copy(update={"claims": held}).write(paths.report("prove_whole"))
    with pytest.raises(RuntimeError, match=r"not proved: serve \(.*but not this checkpoint"):
        stages(prove, log_probability_tolerance=1e-12)
    report = ProveReport.read(paths.report("prove"))
    assert {claim.name: claim.holds for claim in report.claims} == {
        "prune": True,
        "heal": True,
        "quantise": True,
        "serve_whole": True,
        "serve": False,
    }
    assert all(
        c.figures["max_logprob_difference"] < 0.001
        for c in (*control.claims, *report.claims)
        if c.name.startswith("serve")
    )


def test_the_costs_of_sublayers_are_fitted_to_pruned_models_in_vllm(tokenizer, tmp_path, monkeypatch):
    # of one block only the MLP may go: one pruned model beside the whole one
    settings = load(ROOT / "params.yaml").model_copy(update={"throughput": SETTINGS})
    budget = settings.prune.budget.model_copy(update={"unit": "speed_up", "amount": 1.01})
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engines start in half the time
    monkeypatch.chdir(tmp_path)
    random_llama(num_hidden_layers=1).save_pretrained(paths.MODEL)
    tokenizer.save_pretrained(paths.MODEL)
    paths.REPORTS.mkdir()
    found = costs.run(settings.model_copy(update={"prune": settings.prune.model_copy(update={"budget": budget})}))
    assert found == CostsReport.read(paths.report("costs"))
    (timed,) = found.timed
    assert timed.removed == ["0.mlp"]
    assert timed.time_ratio.low <= timed.time_ratio.median <= timed.time_ratio.high
    for fit in (found.time, found.tpot):
        assert sum(len(group.sublayers) * group.ms for group in fit.groups) + fit.base_ms > 0
    assert not (paths.WORK / "costs").exists()
    assert {"memory", "time", "tpot"} <= costs_with(ModelDirectory(paths.MODEL), paths.report("costs")).keys()
