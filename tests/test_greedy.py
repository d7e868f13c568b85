"""The search against brute force by another route: full forwards of the masked, unmodified transformers model."""

import inspect
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import random_llama
from family_models import CASES, UNDECLARED, random_model
from family_models import settings as family_settings
from threadpoolctl import threadpool_info
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finercut.model.families import PRE_NORM, layout_of
from finercut.model.masking import masked
from finercut.model.probe import find_layout
from finercut.model.workers import Workers
from finercut.selection.blocks import Blocks
from finercut.selection.divergence import DIVERGENCES
from finercut.selection.greedy import search
from finercut.selection.race import MODES
from finercut.selection.sweep import MicroBatch, Sweep, micro_batch
from finercut.sublayers import candidates
from finercut.tokens import source_weights


@pytest.fixture(scope="module")
def model():
    return random_llama()


def brute_force(model, tokens, n_removals, divergence="js", kinds="both"):
    """[(name, {name: divergence})] of every step, by full forwards of the whole model with sublayers masked."""
    pool, removed, steps = candidates(4, kinds), [], []
    with torch.no_grad():
        whole = model(tokens).logits
        for _ in range(n_removals):
            values = {}
            for candidate in pool:
                if candidate in removed:
                    continue
                gone = [s for c in (*removed, candidate) for s in c.sublayers]
                with masked(model, gone):
                    values[candidate] = DIVERGENCES[divergence](whole, model(tokens).logits).mean().item()
            best = min(values, key=values.__getitem__)
            removed.append(best)
            steps.append((str(best), {str(c): v for c, v in values.items()}))
    return steps


@pytest.mark.parametrize("kinds", ["both", "attention", "mlp", "blocks"])
def test_removals_and_values_equal_brute_force(model, tokens, kinds):
    n_removals = {"both": 4, "blocks": 2}.get(kinds, 3)
    expected = brute_force(model, tokens, n_removals, kinds=kinds)
    found = list(search(model, tokens, tokens, n_removals, kinds=kinds, mode="brute"))
    assert [r.sublayer for r in found] == [name for name, _ in expected]
    for removal, (_, values) in zip(found, expected, strict=True):
        assert removal.values == pytest.approx(values, rel=1e-4, abs=1e-6)
        assert removal.divergence == removal.values[removal.sublayer]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_abandoning_changes_neither_removals_nor_divergences(model, tokens, divergence):
    every = list(search(model, tokens, tokens, 5, divergence=divergence, mode="brute"))
    some = list(search(model, tokens, tokens, 5, divergence=divergence))
    assert [(r.sublayer, r.divergence) for r in some] == [(r.sublayer, r.divergence) for r in every]
    assert sum(r.sublayer_passes for r in some) < sum(r.sublayer_passes for r in every)
    for fewer, all_ in zip(some, every, strict=True):
        assert fewer.values.keys() | fewer.abandoned.keys() == all_.values.keys()
        assert fewer.margin is None
        for name, bound in fewer.abandoned.items():
            assert fewer.divergence < bound <= all_.values[name] * (1 + 1e-6)


@pytest.mark.parametrize("mode", ["lazy", "racing"])
def test_lazy_and_racing_find_the_removals_of_brute_force_with_less_work_and_say_what_they_took_on_trust(
    model, tokens, mode
):
    every = list(search(model, tokens, tokens, 5, mode="brute"))
    exact = list(search(model, tokens, tokens, 5))
    some = list(search(model, tokens, tokens, 5, mode=mode, error_probability=0.1))
    assert [(r.sublayer, r.divergence) for r in some] == [(r.sublayer, r.divergence) for r in every]
    assert sum(r.sublayer_passes for r in some) < sum(r.sublayer_passes for r in exact)
    assert sum(r.head_tokens for r in some) < sum(r.head_tokens for r in exact)
    for fewer, all_ in zip(some, every, strict=True):
        assert fewer.mode == mode
        judged = fewer.stale | fewer.dropped
        assert fewer.values.keys() | fewer.abandoned.keys() | judged.keys() == all_.values.keys()
        assert fewer.margin == (min(judged.values()) - fewer.divergence if judged else None)
        assert fewer.error_probability == (0.1 if fewer.dropped else 0)
    assert any(r.stale for r in some)


@pytest.mark.parametrize("head_tokens", [16, 48])
def test_the_head_is_not_run_on_the_rest_of_a_window_once_a_candidate_is_over_its_limit(model, tokens, head_tokens):
    windows = tokens.reshape(2, -1)  # 72 tokens: 5 segments
    with torch.inference_mode():
        blocks = Blocks(model, PRE_NORM, windows[:1])
        sizes = MicroBatch(tokens=1024, logits=head_tokens * 400, divergence_logits=5 * 400)
        sweep = Sweep(blocks, windows, DIVERGENCES["js"], Workers(model.device), sizes)
    first, second, third = candidates(4)[:3]
    whole = sweep.totals({1: {first: math.inf, second: math.inf, third: math.inf}})[1]
    assert [len(segments) for segments in whole.values()] == [5, 5, 5]
    over_two = sum(whole[second][:2]) * 1.0001
    cut = sweep.totals({1: {first: 0.0, second: over_two, third: math.inf}})[1]
    assert [len(segments) for segments in cut.values()] == [1, 3, 5]
    for candidate, segments in cut.items():
        assert segments == pytest.approx(whole[candidate][: len(segments)], rel=1e-5)


def test_micro_batches_change_the_last_bits_at_most(model, tokens):
    usual = list(search(model, tokens, tokens, 3))
    small = list(search(model, tokens, tokens, 3, micro_batch_tokens=20))
    assert [r.sublayer for r in small] == [r.sublayer for r in usual]
    assert [r.divergence for r in small] == pytest.approx([r.divergence for r in usual], rel=1e-5)


@pytest.mark.parametrize("mode", ["exact", "racing"])
def test_windows_that_run_together_as_on_a_gpu_change_the_last_bits_at_most(model, tokens, mode, monkeypatch):
    apart = list(search(model, tokens, tokens, 4, mode=mode))
    sizes = []

    def noting_size(blocks, unit, states, removed, run=Blocks.run):
        sizes.append(len(states))
        return run(blocks, unit, states, removed)

    monkeypatch.setattr(Blocks, "run", noting_size)
    monkeypatch.setattr(Sweep, "_joins_windows", True)
    # 20 branches of 24 tokens at once, of 8 candidates in 6 windows.
    together = list(search(model, tokens, tokens, 4, mode=mode, micro_batch_tokens=20 * 24))
    assert [r.sublayer for r in together] == [r.sublayer for r in apart]
    assert [r.divergence for r in together] == pytest.approx([r.divergence for r in apart], rel=1e-5)
    assert 8 < max(sizes) <= 20
    assert sizes[:8] == [12] * 8  # the trunk: 6 windows to search on, 6 held out


def test_micro_batches_of_a_gpu_are_the_same_when_a_little_less_of_it_is_free(model, tokens):
    blocks = Blocks(model, layout_of(model.config), tokens[:1])
    assert (blocks.width, blocks.widest) == (128, 192)
    # A token takes (8 * 128 + 4 * 192) * 4 bytes of a third of them, a logit 24 of another third. Besides, 2 windows of
    # 24 tokens have 4 states of 128 numbers a block, and logits.
    beside = 2 * 24 * (4 * 4 * 128 * 4 + 4 * 400)
    n_bytes = 3 * (8 * 128 + 4 * 192) * 4 * 4096

    def fits(free):
        return micro_batch(blocks, 2, 24, free_bytes=free + beside)

    least = MicroBatch(tokens=4096, logits=2**20, divergence_logits=2**20)
    assert fits(n_bytes) == fits(n_bytes + 7 * 2**20) == least
    assert fits(n_bytes - 3).tokens == 2048
    # whatever is free: one segment of logits; no more tokens than a GPU gains from
    assert fits(0) == MicroBatch(tokens=0, logits=16 * 400, divergence_logits=16 * 400)
    assert fits(2**40).tokens == 2**15


class WidestProduct(TorchDispatchMode):
    """The most numbers of a token that a matrix product is given or gives. Windows are shorter than that."""

    width = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if "mm" in operation.__name__ or "linear" in operation.__name__:
            tensors = [t for t in (*arguments, result) if isinstance(t, torch.Tensor)]
            self.width = max(self.width, *(t.shape[-1] for t in tensors if t.dim() > 1))
        return result


def test_micro_batches_are_sized_by_the_heads_logits_whatever_the_config_says(tokens):
    model = random_llama()
    model.lm_head = torch.nn.Linear(128, 416, bias=False)
    blocks = Blocks(model, PRE_NORM, tokens[:1])
    assert (model.config.vocab_size, blocks.vocabulary) == (400, 416)
    assert micro_batch(blocks, 2, 24, wanted=32) == MicroBatch(32, 32 * 416, 32 * 416)


@pytest.mark.parametrize("case", [*CASES, *UNDECLARED])
def test_micro_batches_need_no_names_of_a_familys_config(case):
    model_type, changes = (CASES | UNDECLARED)[case]
    model = random_model(model_type, **changes)
    layout = find_layout(model) if case in UNDECLARED else layout_of(model.config)
    blocks = Blocks(model, layout, torch.ones(1, 8).long())
    assert blocks.width == model.config.hidden_size == 64
    states = blocks.embed(torch.ones(1, 8).long())
    with torch.no_grad(), WidestProduct() as seen:
        for unit in blocks.units:
            states = blocks.run(unit, states, [])
    assert blocks.widest == seen.width
    assert blocks.vocabulary == 400
    assert micro_batch(blocks, 2, 8, free_bytes=2**30).tokens > 0


@pytest.mark.parametrize("case", [*CASES, *UNDECLARED])
def test_fixtures_use_names_that_their_configs_have(case):
    model_type, changes = (CASES | UNDECLARED)[case]
    kind = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(kind.__init__).parameters, *kind.attribute_map}
    assert set(family_settings(model_type, **changes)) - known == set()


def in_new_thread(function):
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


def threads():
    """What torch and every BLAS take in this thread and in a new one, and how many threads there are."""

    def numbers():
        return torch.get_num_threads(), sorted((pool["filepath"], pool["num_threads"]) for pool in threadpool_info())

    return numbers(), in_new_thread(numbers), threading.active_count()


@pytest.fixture
def two_and_three_threads():
    """Torch computes with two threads in this thread, with three in new ones."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    in_new_thread(lambda: torch.set_num_threads(3))
    torch.ones(4, 4) @ torch.ones(4, 4)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize("end", ["end", "close", "forget", "fail"])
def test_a_search_leaves_the_threads_as_they_were(model, tokens, end, two_and_three_threads):
    def fail():
        raise OSError

    before = threads()
    assert (before[0][0], before[1][0]) == (2, 3)
    found = search(model, tokens, tokens, 2, progress=fail if end == "fail" else lambda: None)
    if end == "fail":
        with pytest.raises(OSError):
            next(found)
    else:
        next(found)
        assert threads()[:2] == before[:2], "in the middle of a search"
        assert threading.active_count() > before[2]
    if end == "end":
        list(found)
    elif end == "close":
        found.close()
    del found
    assert threads() == before


def test_pieces_of_work_are_computed_by_one_thread_each(two_and_three_threads):
    with Workers(torch.device("cpu")) as workers:
        meeting = threading.Barrier(2, timeout=60)

        def piece(_):
            meeting.wait()  # so that both threads have one
            torch.ones(300, 300) @ torch.ones(300, 300)
            return threading.get_ident(), torch.get_num_threads()

        found = workers.map(piece, range(4))
    assert len({thread for thread, _ in found}) == 2
    assert {n_threads for _, n_threads in found} == {1}


SOURCES = ("a", "b", "a", "a", "c", "a")  # 4, 1 and 1 of 6 windows


def by_source(model, tokens, sources, gone):
    """Mean divergence on the windows of each source, by full forwards of the masked model."""
    with torch.no_grad():
        whole = model(tokens).logits
        with masked(model, gone):
            values = DIVERGENCES["js"](whole, model(tokens).logits).mean(-1).tolist()
    of = {name: [v for v, source in zip(values, sources, strict=True) if source == name] for name in sorted({*sources})}
    return {name: sum(found) / len(found) for name, found in of.items()}


@pytest.mark.parametrize("mode", MODES)
def test_a_divergence_is_a_mean_over_sources_and_not_over_windows(model, tokens, mode):
    found = list(
        search(model, tokens, tokens, 3, mode=mode, calibration_sources=SOURCES, held_out_sources=SOURCES[::-1])
    )
    gone = []
    for removal in found:
        expected = {}
        for candidate in candidates(4, "both"):
            if set(gone).isdisjoint(candidate.sublayers):
                means = by_source(model, tokens, SOURCES, [*gone, *candidate.sublayers])
                expected[str(candidate)] = sum(means.values()) / 3
        assert removal.sublayer == min(expected, key=expected.get)
        assert removal.values == pytest.approx({name: expected[name] for name in removal.values}, rel=1e-4, abs=1e-6)
        gone += [s for c in candidates(4, "both") if str(c) == removal.sublayer for s in c.sublayers]
        held_out = by_source(model, tokens, SOURCES[::-1], gone)
        assert removal.held_out_by_source == pytest.approx(held_out, rel=1e-4)
        assert removal.held_out_divergence == pytest.approx(sum(held_out.values()) / 3, rel=1e-4)
    if mode == "brute":
        plain = list(search(model, tokens, tokens, 3, mode=mode))
        assert [r.divergence for r in plain] != pytest.approx([r.divergence for r in found], rel=1e-3)


def test_sources_with_as_many_windows_each_change_no_bit(model, tokens):
    sources = ("a", "b") * 3
    for mode in MODES:
        plain = list(search(model, tokens, tokens, 3, mode=mode))
        weighted = list(search(model, tokens, tokens, 3, mode=mode, calibration_sources=sources))
        assert weighted == plain
        assert all(removal.held_out_by_source == {} for removal in plain)


def test_windows_weigh_so_that_every_source_counts_alike():
    assert source_weights(("a", "b", "a", "a")) == [2 / 3, 2, 2 / 3, 2 / 3]
    assert source_weights(("a",) * 7) == [1.0] * 7
    assert source_weights(("a", "b", "c") * 11) == [1.0] * 33
    assert source_weights(()) == []


def test_held_out_divergence_is_measured_on_the_held_out_tokens(model, tokens):
    calibration, held_out = tokens[:3], tokens[3:]
    (first,) = search(model, calibration, held_out, 1)
    ((_, values),) = brute_force(model, held_out, 1)
    assert first.held_out_divergence == pytest.approx(values[first.sublayer], rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_continuing_gives_what_an_undisturbed_search_gives(model, tokens, mode):
    undisturbed = list(search(model, tokens, tokens, 5, mode=mode))
    for n_earlier in (1, 3):
        earlier = undisturbed[:n_earlier]
        assert list(search(model, tokens, tokens, 5, mode=mode, earlier=earlier)) == undisturbed[n_earlier:]


def test_prefix_reuse_runs_a_candidate_from_its_own_depth_only(model, tokens):
    # One window: the candidate that is n sublayers from the end costs n - 1 passes, 0 + 1 + ... + 7 = 28 in all.
    (first,) = search(model, tokens[:1], tokens[:1], 1, mode="brute")
    assert first.sublayer_passes == 28
    assert first.brute_force_sublayer_passes == 8 * 7


@pytest.mark.parametrize("mode", MODES)
def test_sublayers_that_change_nothing_go_first_and_shallower_ones_before_deeper(tokens, mode):
    model = random_llama()
    with torch.no_grad():
        for index in (1, 2):
            model.model.layers[index].self_attn.o_proj.weight.zero_()
    first, second, third = search(model, tokens, tokens, 3, mode=mode)
    assert (first.sublayer, second.sublayer) == ("1.attention", "2.attention")
    assert first.divergence == second.divergence == pytest.approx(0, abs=1e-6)
    assert third.divergence > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_one_window_and_one_candidate_are_enough(model, tokens, mode):
    (only,) = search(model, tokens[:1], tokens[:1], 1, mode=mode, protect=["0.block", "1.block", "2.block", "3.mlp"])
    assert only.sublayer == "3.attention"
    assert only.divergence == pytest.approx(only.held_out_divergence)


def test_windows_of_two_lengths_and_modes_that_do_not_exist_are_refused(model, tokens):
    with pytest.raises(ValueError, match="calibration windows have 24 tokens, held-out windows 12"):
        next(search(model, tokens, tokens[:, :12], 1))
    with pytest.raises(ValueError, match="mode is exact, lazy, racing or brute, not 'fast'"):
        next(search(model, tokens, tokens, 1, mode="fast"))


def test_nothing_is_left_to_remove_when_all_is_protected(model, tokens):
    with pytest.raises(ValueError, match=r"cannot remove 1 of 0 candidates \(8 are protected\)"):
        next(search(model, tokens, tokens, 1, protect=[f"{i}.block" for i in range(4)]))


def test_protected_sublayers_stay(model, tokens):
    names = [r.sublayer for r in search(model, tokens, tokens, 4, protect=["0.block", "3.attention", "2.mlp"])]
    assert sorted(names) == ["1.attention", "1.mlp", "2.attention", "3.mlp"]
    with pytest.raises(ValueError, match=r"cannot remove 5 of 4 candidates \(4 are protected\)"):
        next(search(model, tokens, tokens, 5, protect=["0.block", "3.attention", "2.mlp"]))


def test_the_front_stays_until_the_authors_number_of_removals(model, tokens):
    # x = 0.25 of 8: blocks 0 and 1 are out of reach for the first three removals
    found = [r.sublayer for r in search(model, tokens, tokens, 4, exclude=0.25)]
    assert all(name[0] in "23" for name in found[:3])


def test_the_last_attention_stays(model, tokens):
    names = [r.sublayer for r in search(model, tokens, tokens, 3, kinds="attention")]
    assert len(set(names)) == 3
    with pytest.raises(ValueError, match="nothing may be removed after 3 removals"):
        list(search(model, tokens, tokens, 4, kinds="attention"))


def test_a_candidate_with_non_finite_output_is_never_removed(model, tokens):
    with torch.inference_mode():
        blocks = Blocks(model, PRE_NORM, tokens[:1])
        sweep = Sweep(blocks, tokens, DIVERGENCES["js"], Workers(model.device), MicroBatch(64, 64 * 400, 400))
        # What the branch without block 1's attention starts from; the others start before or after it.
        sweep.trunk[2] = torch.full_like(sweep.trunk[2], math.nan)
    pool = candidates(4)
    totals = sweep.totals({0: dict.fromkeys(pool, math.inf)})[0]
    assert {str(c) for c, segments in totals.items() if math.inf in segments} == {"1.attention"}


def test_a_whole_model_with_non_finite_logits_is_refused(tokens):
    model = random_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="whole model's logits are not finite"):
        next(search(model, tokens, tokens, 1))
