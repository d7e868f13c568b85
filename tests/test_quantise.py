"""The step `quantise`: checkpoints quantised here number by number, and by llm-compressor where it is installed."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from quantised_checkpoints import quantise_by_hand, settings
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finercut.checkpoint import lineage, quantise
from finercut.checkpoint.records import QuantiseReport
from finercut.checkpoint.steps import Proof
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load_pruned
from finercut.model.remote_code import TRUSTED_KEY
from finercut.system import compressor
from finercut.tokens import load_tokens, sha256_of
from pipelines import params, paths, steps

CHANGED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def by_hand(workspace):
    """Makes artifacts/quantised of the healed checkpoint; returns what its matrices stand for."""

    def made(scheme, **changes):
        parent, chosen = ModelDirectory(paths.HEALED), settings(scheme, **changes)
        shutil.rmtree(paths.QUANTISED)
        shutil.copytree(paths.HEALED, paths.QUANTISED)
        meant = quantise_by_hand(paths.QUANTISED, chosen)
        entry = lineage.entry("quantise", parent, chosen.model_dump(mode="json"))
        lineage.append(ModelDirectory(paths.QUANTISED), entry)
        report(chosen)
        return meant

    return made


def report(chosen):
    found = ModelDirectory(paths.QUANTISED).weights_sha256
    made = QuantiseReport(method=chosen.method, scheme=chosen.scheme, sha256=found)
    made.write(paths.report("quantise"))


def claim(tokens):
    proof = Proof(
        tokens[4:], 1e-3, torch.device("cpu"), whole=ModelDirectory(paths.MODEL), report=paths.report("quantise")
    )
    return quantise.claim(ModelDirectory(paths.HEALED), ModelDirectory(paths.QUANTISED), proof)


def test_quantising_by_none_takes_no_second_copy(workspace, tokens):
    steps.run_and_report("quantise", params.load())
    for file in paths.HEALED.iterdir():
        assert (paths.QUANTISED / file.name).samefile(file)
    assert QuantiseReport.read(paths.report("quantise")).method == "none"
    assert claim(tokens).holds
    (paths.QUANTISED / "config.json").unlink()
    (paths.QUANTISED / "config.json").write_text(
        json.dumps(ModelDirectory(paths.HEALED).settings | {"eos_token_id": 3})
    )
    assert not claim(tokens).holds


@pytest.mark.parametrize(("scheme", "group"), [("w8a8", None), ("fp8", None), ("w4a16", 32)])
def test_what_loads_is_what_the_stored_numbers_stand_for_and_the_claim_holds(by_hand, tokens, scheme, group):
    meant = by_hand(scheme, group_size=group, max_divergence_rise=1.0)
    loaded = load_pruned(paths.QUANTISED, torch.float32)
    assert meant
    for name, weight in meant.items():
        assert torch.equal(loaded.get_parameter(name).detach(), weight), name
    names = load_pruned(paths.HEALED).state_dict().keys()
    assert loaded.state_dict().keys() == names
    found = claim(tokens)
    assert found.holds
    assert 0.3 < found.figures["rounding_steps"] <= 0.5 + 1e-3
    assert found.figures["n_quantised"] == len(meant)
    # The plain way, by compressed-tensors' own simulation of inputs, is as near as its rounding is.
    plain = AutoModelForCausalLM.from_pretrained(paths.QUANTISED, dtype=torch.float32).eval()
    with torch.inference_mode():
        ours, theirs = (model(tokens[4:], use_cache=False).logits for model in (loaded, plain))
    spread = ours.std()
    assert (ours - theirs).abs().mean() < (1e-5 if scheme == "w4a16" else 0.1) * spread


@pytest.mark.parametrize(
    ("scheme", "given", "rounded"),
    [
        # The largest decides the scale: 1 in integers up to 127, and in floating point up to 448.
        ("w8a8", [127.0, 51.4, -0.6, 0.3], [127.0, 51.0, -1.0, 0.0]),
        ("fp8", [-448.0, 51.4, -0.6, 17.1], [-448.0, 52.0, -0.625, 18.0]),
    ],
)
def test_inputs_are_rounded_as_vllm_rounds_them(by_hand, scheme, given, rounded):
    by_hand(scheme)
    module = load_pruned(paths.QUANTISED, torch.float32).get_submodule(CHANGED.removesuffix(".weight"))
    states = torch.zeros(1, 128)
    states[0, : len(given)] = torch.tensor(given)
    expected = torch.zeros(1, 128)
    expected[0, : len(given)] = torch.tensor(rounded)
    assert torch.equal(module(states), torch.nn.functional.linear(expected, module.weight))


@pytest.mark.parametrize("what", ["weight", "norm", "config", "report", "divergence"])
def test_the_claim_does_not_hold_where_something_else_changed(by_hand, tokens, what):
    chosen = {"max_divergence_rise": 0.0} if what == "divergence" else {"max_divergence_rise": 1.0}
    by_hand("w8a8", **chosen)
    file = paths.QUANTISED / "model.safetensors"
    tensors = load_file(file)
    if what == "weight":
        tensors[CHANGED][0, 0] += 3 if tensors[CHANGED][0, 0] < 100 else -3
    elif what == "norm":
        tensors["model.norm.weight"][0] += 1
    elif what == "config":
        config = json.loads((paths.QUANTISED / "config.json").read_text())
        (paths.QUANTISED / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    save_file(tensors, file, {"format": "pt"})
    if what != "report":
        report(settings("w8a8"))
    else:
        QuantiseReport(method="rtn", sha256="0" * 64).write(paths.report("quantise"))
    found = claim(tokens)
    assert not found.holds
    if what == "weight":
        assert 2.5 <= found.figures["rounding_steps"] <= 3.5


def test_a_quantised_weight_without_its_scale_is_refused(by_hand):
    by_hand("w8a8")
    file = paths.QUANTISED / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{CHANGED}_scale"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight_scale"):
        AutoModelForCausalLM.from_pretrained(paths.QUANTISED)


def test_groups_that_do_not_divide_are_refused_before_anything_runs(workspace, monkeypatch):
    monkeypatch.setattr(compressor, "installed", lambda: "0")
    with pytest.raises(
        ValueError, match=r"group_size: 48 does not divide the 128 columns of .* a divisor of 64, or null"
    ):
        run(settings("w4a16", group_size=48))
    with pytest.raises(ValueError, match="leaves none of"):
        run(settings("w8a8", ignore=["re:.*"]))
    with pytest.raises(ValueError, match=r"quantise\.ignore: no module is called 'model.layers.0.mlp.downproj'"):
        run(settings("w8a8", ignore=["model.layers.0.mlp.downproj"]))
    with pytest.raises(ValidationError, match=r"'re:\*down' is no regular expression: nothing to repeat"):
        settings("w8a8", ignore=["re:*down"])
    with pytest.raises(ValidationError, match="group_size is for w4a16; w8a8 has one scale a row"):
        settings("w8a8", group_size=32)


def test_a_model_with_code_of_its_own_is_refused(workspace):
    quantise.check_own_code(ModelDirectory(paths.HEALED))
    file = paths.HEALED / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {TRUSTED_KEY: True}))
    with pytest.raises(ValueError, match=r"runs by Python code of its own, which is not quantised"):
        quantise.check_own_code(ModelDirectory(paths.HEALED))


def test_without_llm_compressor_the_step_says_how_to_get_it(workspace, monkeypatch):
    monkeypatch.setattr(compressor, "installed", lambda: None)
    with pytest.raises(RuntimeError, match="run `make setup QUANTISE=1`, or set quantise.method to none"):
        run(settings("w8a8"))


def run(chosen):
    return steps.run_and_report("quantise", params.load().model_copy(update={"quantise": chosen}))


@pytest.mark.parametrize(("visible", "chosen"), [(None, "1"), ("2,3", "3"), ("GPU-a,GPU-b", "GPU-b")])
def test_llm_compressor_takes_the_gpu_that_torch_counts(workspace, monkeypatch, tmp_path, visible, chosen):
    monkeypatch.setattr(quantise, "device_of", lambda _: torch.device("cuda:1"))
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def started(_, variables):
        raise RuntimeError(variables["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setattr(quantise, "start_group", started)
    monkeypatch.setattr(quantise, "interpreter", lambda: "python")
    with pytest.raises(RuntimeError, match=f"^{chosen}$"):
        quantise._run(ModelDirectory(paths.HEALED), tmp_path / "result", settings("w8a8", "rtn"), None)


@pytest.mark.slow
@pytest.mark.skipif(compressor.installed() is None, reason="make setup QUANTISE=1 installs llm-compressor")
@pytest.mark.parametrize(
    ("scheme", "method", "group"), [("w8a8", "rtn", None), ("w7a8", "rtn", None), ("w4a16", "gptq", 32)]
)
def test_llm_compressor_quantises_and_its_claim_holds(workspace, tokens, scheme, method, group):
    found = run(settings(scheme, method, group_size=group, max_divergence_rise=0.5))
    child = ModelDirectory(paths.QUANTISED)
    assert found.bytes_after < found.bytes_before / (1.5 if scheme == "w4a16" else 1.2)
    assert child.removed == ModelDirectory(paths.HEALED).removed
    made = lineage.lineage_of(child)[-1]
    assert (made.step, made.settings["scheme"], bool(made.n_tokens)) == ("quantise", scheme, method == "gptq")
    if method == "gptq":
        looked_at = load_tokens(paths.CALIBRATION)
        assert made.tokens_sha256 == sha256_of(looked_at.calibration[: made.settings["n_samples"]])
    assert claim(tokens).holds
    numbers = load_file(paths.QUANTISED / "model.safetensors").get(CHANGED)
    if numbers is not None:
        assert int(numbers.int().abs().max()) in ({63, 64} if scheme == "w7a8" else {127, 128})
