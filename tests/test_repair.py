"""A search that refits between removals, against full forwards of the masked model with refitted weights."""

import pytest
import torch
from conftest import few_tokens, random_llama
from family_models import CASES, random_model

from finercut.model.masking import masked
from finercut.selection import refit
from finercut.selection.divergence import js
from finercut.selection.greedy import search
from finercut.selection.repair import Repair
from finercut.selection.settings import Refitting
from finercut.sublayers import candidates

N = 24
RIDGES = [0.01, 0.1, 1.0]


CALIBRATION, HELD_OUT, HEALING = few_tokens(4, 0), few_tokens(2, 1), few_tokens(48, 2)


def searched(model, n_removals, every=1, **how):
    repair = Repair(model, HEALING, Refitting(every=every, ridges=RIDGES, batch_tokens=8 * N))
    return list(search(model, CALIBRATION, HELD_OUT, n_removals, repair=repair, **how))


def by_full_forwards(n_removals, every):
    """Of each step: what is removed, the candidates' values, and the divergence with own and with refitted weights."""
    whole = random_llama()
    with torch.no_grad():
        expected = whole(CALIBRATION).logits

    def divergence(model, gone):
        with torch.no_grad(), masked(model, [s for c in gone for s in c.sublayers]):
            return js(expected, model(CALIBRATION).logits).mean().item()

    gone, steps, now = [], [], whole
    for step in range(1, n_removals + 1):
        values = {c: divergence(now, [*gone, c]) for c in candidates(4) if c not in gone}
        gone.append(min(values, key=values.__getitem__))
        now = random_llama()
        if removed := [s for c in gone[: step - step % every] for s in c.sublayers]:
            refit.fit(now, HEALING, removed, RIDGES, 8 * N)
        steps.append((str(gone[-1]), values, divergence(whole, gone), divergence(now, gone)))
    return steps


@pytest.mark.parametrize("every", [1, 2])
def test_candidates_are_judged_in_the_refitted_model_and_recorded_in_the_pruned_one(every):
    model = random_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found, expected = searched(model, 4, every, mode="brute"), by_full_forwards(4, every)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for removal, (name, values, own, refitted) in zip(found, expected, strict=True):
        assert removal.sublayer == name
        assert removal.values == pytest.approx({str(c): v for c, v in values.items()}, rel=1e-3)
        assert removal.divergence == pytest.approx(own, rel=1e-4)
        if removal.step < every:
            assert removal.refitted is None
        else:
            assert removal.refitted.divergence == pytest.approx(refitted, rel=1e-3)
            assert removal.refitted.divergence < removal.divergence


def test_abandoning_and_continuing_change_nothing():
    def decided(removals):
        return [(r.sublayer, r.divergence, r.refitted) for r in removals]

    model = random_llama()
    undisturbed = searched(model, 5, every=2)
    assert decided(undisturbed) == decided(searched(model, 5, every=2, mode="brute"))
    assert sum(r.sublayer_passes for r in undisturbed) < sum(r.brute_force_sublayer_passes for r in undisturbed)
    assert searched(model, 5, every=2, earlier=undisturbed[:3]) == undisturbed[3:]


def test_a_refit_that_is_worse_is_not_gone_on_with(monkeypatch):
    model = random_llama()

    def spoil(self, place):
        return refit.Fitted({"model.layers.3.mlp.down_proj.weight": torch.full((128, 192), 9.0)}, 1.0, "spoilt")

    monkeypatch.setattr(refit.ClosedForm, "__call__", spoil)
    plain = list(search(model, CALIBRATION, HELD_OUT, 3))
    spoilt = searched(model, 3)
    assert [(r.sublayer, r.values, r.refitted) for r in spoilt] == [(r.sublayer, r.values, None) for r in plain]


def test_what_cannot_be_refitted_is_refused_before_the_search():
    model_type, changes = CASES["gpt_neox"]
    with pytest.raises(ValueError, match="refit cannot fit a gpt_neox model"):
        Repair(random_model(model_type, **changes), HEALING, Refitting())
    with pytest.raises(ValueError, match="two windows at least, one to fit to"):
        Repair(random_llama(), HEALING[:1], Refitting())
