import pytest
import torch
from conftest import random_llama

from finercut.checkpoint.parity import N_CACHED_TOKENS, _logits, check_parity
from finercut.checkpoint.writing import write_pruned
from finercut.model.directory import ModelDirectory
from finercut.sublayers import parse

TOLERANCE = 1e-4


def sublayers(*names):
    return [parse(name).sublayers[0] for name in names]


def without(model, *names):
    """The same model by another route: sublayers whose output projection is zero add nothing."""
    with torch.no_grad():
        for sublayer in sublayers(*names):
            block = model.model.layers[sublayer.block]
            (block.self_attn.o_proj if sublayer.kind == "attention" else block.mlp.down_proj).weight.zero_()
    return model


def saved(model, tokenizer, directory):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def parity(whole, folder, held_out, tolerance):
    directories = ModelDirectory(whole), ModelDirectory(folder / "pruned")
    return check_parity(*directories, held_out, tolerance, torch.device("cpu"))


@pytest.fixture(scope="module")
def held_out():
    return torch.randint(3, 400, (6, 60), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("names", [("0.attention",), ("1.attention", "1.mlp", "2.attention"), ("3.mlp",)])
def test_a_pruned_checkpoint_is_the_masked_whole_model(tmp_path, tiny_model, held_out, names):
    write_pruned(tiny_model, sublayers(*names), tmp_path / "pruned", {}, "")
    report = parity(tiny_model, tmp_path, held_out, TOLERANCE)
    assert report.passed
    assert report.max_logit_difference <= TOLERANCE
    assert report.max_logit_difference_cached <= TOLERANCE
    assert report.n_tokens == 4 * 60
    # Half of the weights in memory at a time.
    pair = ModelDirectory(tiny_model), ModelDirectory(tmp_path / "pruned")
    assert check_parity(*pair, held_out, TOLERANCE, torch.device("cpu"), weights_gib=1e-3) == report


def test_removing_another_sublayer_than_the_config_says_fails_by_the_difference_it_makes(
    tmp_path, tiny_model, tokenizer, held_out
):
    # The checkpoint says that 1.mlp is gone; 2.attention adds nothing either.
    damaged = saved(without(random_llama(), "2.attention"), tokenizer, tmp_path / "damaged")
    write_pruned(damaged, sublayers("1.mlp"), tmp_path / "pruned", {}, "")
    report = parity(tiny_model, tmp_path, held_out, TOLERANCE)
    right, wrong = without(random_llama(), "1.mlp"), without(random_llama(), "1.mlp", "2.attention")
    with torch.no_grad():
        differences = (right(held_out[:4]).logits - wrong(held_out[:4]).logits).abs()
    assert not report.passed
    assert report.max_logit_difference == pytest.approx(differences.max().item(), abs=TOLERANCE)
    # A cache changes nothing, so the first 48 tokens one by one differ as they do in one forward.
    assert report.max_logit_difference_cached == pytest.approx(differences[:, :48].max().item(), abs=TOLERANCE)


def test_a_model_that_reads_its_cache_gives_the_logits_of_one_forward(held_out):
    uncached, cached = _logits(random_llama(), held_out)
    assert cached.shape == (6, N_CACHED_TOKENS, 400)
    torch.testing.assert_close(cached, uncached[:, :N_CACHED_TOKENS], atol=TOLERANCE, rtol=0)


def test_a_tolerance_below_the_difference_fails(tmp_path, tiny_model, tokenizer, held_out):
    slightly = random_llama()
    with torch.no_grad():
        slightly.model.layers[2].mlp.down_proj.weight[0, 0] += 0.1
    write_pruned(saved(slightly, tokenizer, tmp_path / "other"), sublayers("1.mlp"), tmp_path / "pruned", {}, "")
    report = parity(tiny_model, tmp_path, held_out, 1e9)
    assert report.passed
    strict = check_parity(
        ModelDirectory(tiny_model),
        ModelDirectory(tmp_path / "pruned"),
        held_out,
        report.max_logit_difference * 0.99,
        torch.device("cpu"),
    )
    assert not strict.passed
    assert strict.max_logit_difference == report.max_logit_difference


def test_a_checkpoint_of_another_model_is_refused(tmp_path, tiny_model, tokenizer, held_out):
    other = saved(random_llama(num_hidden_layers=5), tokenizer, tmp_path / "other")
    write_pruned(other, sublayers("4.mlp"), tmp_path / "pruned", {}, "")
    with pytest.raises(ValueError, match=r"was not pruned from .* are \(5, 400\), not \(4, 400\)"):
        parity(tiny_model, tmp_path, held_out, TOLERANCE)


def test_logits_that_are_not_finite_are_named_as_such(tmp_path, tiny_model, tokenizer, held_out):
    broken = random_llama()
    with torch.no_grad():
        broken.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    write_pruned(saved(broken, tokenizer, tmp_path / "broken"), sublayers("1.mlp"), tmp_path / "pruned", {}, "")
    with pytest.raises(RuntimeError, match=r"logits of .*pruned are not finite"):
        parity(tiny_model, tmp_path, held_out, TOLERANCE)


def test_a_missing_checkpoint_names_the_stage_that_writes_it(tmp_path, tiny_model, held_out):
    with pytest.raises(FileNotFoundError, match="finercut prune"):
        parity(tiny_model, tmp_path, held_out, TOLERANCE)
