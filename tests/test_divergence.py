import math

import pytest
import torch
from torch.nn.functional import kl_div

from finercut.selection.divergence import DIVERGENCES, angular, js, js_official, kl, norm

EXTREME = 200.0  # a logit that leaves the other entries no probability in float32


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 7, 50, generator=generator) * 3


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_where_outputs_agree_and_one_value_a_token(name, logits):
    values = DIVERGENCES[name](logits[0], logits[0].clone())
    assert values.shape == (3, 7)
    assert values.max() < 1e-3 if name == "angular" else values.max() < 1e-6
    assert (DIVERGENCES[name](*logits) > 0).all()


def test_js_of_disjoint_distributions_is_ln_2():
    whole = torch.tensor([[EXTREME, 0.0]])
    assert js(whole, whole.flip(-1)).item() == pytest.approx(math.log(2), rel=1e-6)


def test_js_by_hand():
    # P = (1/2, 1/2), Q = (1/4, 3/4), M = (3/8, 5/8)
    p, q = torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log()
    by_hand = (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)) / 2 + (
        0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    ) / 2
    assert js(p, q).item() == pytest.approx(by_hand, rel=1e-5)


def test_js_is_symmetric_and_kl_is_not(logits):
    assert torch.allclose(js(*logits), js(*logits.flip(0)), atol=1e-6)
    assert not torch.allclose(kl(*logits), kl(*logits.flip(0)), atol=1e-2)


def test_js_and_kl_equal_torchs_kl_div(logits):
    p, q = logits.double().log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)

    def reference(a, b):
        return kl_div(b, a, log_target=True, reduction="none").sum(-1).float()

    assert torch.allclose(kl(*logits), reference(p, q), atol=1e-5)
    assert torch.allclose(js(*logits), (reference(p, m) + reference(q, m)) / 2, atol=1e-6)
    # The released code swaps kl_div's arguments and averages over the vocabulary.
    official = (reference(m, p) + reference(m, q)) / 2 / 50
    assert torch.allclose(js_official(*logits), official, atol=1e-6)
    assert not torch.allclose(js_official(*logits) * 50, js(*logits), rtol=0.05)


def test_js_does_not_choke_on_probabilities_that_are_zero():
    whole = torch.tensor([[EXTREME, -EXTREME, 0.0]])
    assert js(whole, whole + 1).item() == pytest.approx(0, abs=1e-6)


def test_angle_beyond_90_degrees_counts():
    z = torch.tensor([[1.0, 0.0]])
    assert angular(z, torch.tensor([[0.0, 2.0]])).item() == pytest.approx(0.5)
    assert angular(z, -z).item() == pytest.approx(1.0)


def test_norm_by_hand():
    assert norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])).item() == pytest.approx(5.0)
