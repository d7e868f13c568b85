"""Divergences between the whole and the pruned model's next-token distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Reference = tuple[Tensor, ...]


@dataclass(frozen=True)
class Divergence:
    """A divergence, split so that the part which depends on the whole model alone is computed once.

    It is a mean over tokens of non-negative terms, so partial sums never decrease.
    """

    name: str
    unit: str
    reference: Callable[[Tensor], Reference]
    """(tokens, vocab) float32 logits of the whole model -> what to keep of them; first dimension is tokens."""
    per_token: Callable[[Reference, Tensor], Tensor]
    """Reference and (tokens, vocab) float32 logits of the pruned model -> (tokens,)."""
    along_depth: bool = False
    """It compares hidden states at every depth, and no logits: the sweep computes it."""

    def __call__(self, whole: Tensor, pruned: Tensor) -> Tensor:
        """
        Args:
            whole, pruned: logits, (..., vocab)

        Returns:
            (...) never negative; zero where the two agree.
        """
        shape = whole.shape
        flat_whole, flat_pruned = whole.float().reshape(-1, shape[-1]), pruned.float().reshape(-1, shape[-1])
        return self.per_token(self.reference(flat_whole), flat_pruned).reshape(shape[:-1])


def _probabilities(logits: Tensor) -> Reference:
    """Probabilities and their negative entropy, nats."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return p, torch.linalg.vecdot(p, log_p)


def _js(whole: Reference, pruned: Tensor) -> Tensor:
    # JS = H(M) - (H(P) + H(Q)) / 2, with M = (P + Q) / 2: one logarithm for both of its terms.
    p, negative_entropy_p = whole
    q, negative_entropy_q = _probabilities(pruned)
    m = q.add_(p).mul_(0.5)
    negative_entropy_m = torch.linalg.vecdot(m, m.clamp_min(torch.finfo(m.dtype).tiny).log_())
    return ((negative_entropy_p + negative_entropy_q) / 2 - negative_entropy_m).clamp_min_(0)


def _kl(whole: Reference, pruned: Tensor) -> Tensor:
    p, negative_entropy_p = whole
    return (negative_entropy_p - torch.linalg.vecdot(p, pruned.log_softmax(-1))).clamp_min_(0)


def _js_official(whole: Reference, pruned: Tensor) -> Tensor:
    (log_p,) = whole
    log_q = pruned.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    m = log_m.exp()
    return (torch.linalg.vecdot(m, log_m - (log_p + log_q) / 2) / log_m.shape[-1]).clamp_min_(0)


def _angular(whole: Reference, pruned: Tensor) -> Tensor:
    (z,) = whole
    return torch.nn.functional.cosine_similarity(z, pruned, dim=-1).clamp(-1, 1).acos() / math.pi


def _norm(whole: Reference, pruned: Tensor) -> Tensor:
    (z,) = whole
    return torch.linalg.vector_norm(z - pruned, dim=-1)


def _negative_log_likelihood(targets: Reference, pruned: Tensor) -> Tensor:
    (ids,) = targets
    log_q = pruned.log_softmax(-1)
    found = log_q.gather(-1, ids.clamp_min(0).expand(pruned.shape[:-1])[..., None])[..., 0]
    return torch.where(ids < 0, 0.0, -found).clamp_min_(0)


js = Divergence("js", "nats per token", _probabilities, _js)
"""Jensen-Shannon divergence, in [0, ln 2]. Source: Lin 1991."""

kl = Divergence("kl", "nats per token", _probabilities, _kl)
"""Kullback-Leibler divergence of the pruned from the whole model, KL(whole || pruned)."""

js_official = Divergence(
    "js_official", "nats per token and vocabulary entry", lambda z: (z.log_softmax(-1),), _js_official
)
"""What the authors' released code computes as Jensen-Shannon: (KL(M||P) + KL(M||Q)) / 2, over the vocabulary's size.

The arguments of `kl_div` are swapped there; kept to reproduce their order. Unbounded.
"""

angular = Divergence("angular", "half turns", lambda z: (z,), _angular)
"""Angle between logit vectors over pi, in [0, 1]. The authors' code clamps angles above 90 degrees; this does not."""

norm = Divergence("norm", "logits", lambda z: (z,), _norm)
"""Euclidean distance between logit vectors."""


def _nothing(logits: Tensor) -> Reference:
    return (logits.new_zeros(len(logits)),)


def _of_hidden_states(whole: Reference, pruned: Tensor) -> Tensor:
    raise NotImplementedError("a distance along the depth does not follow from logits: Sweep computes it")


trajectory = Divergence("trajectory", "relative squared distance", _nothing, _of_hidden_states, along_depth=True)
"""Distance of the hidden states along the depth: |pruned - whole|^2 / |whole|^2 after each sublayer (or block, where
blocks run as one), mean over these. Logits do not count. Source: after OPTIN, arXiv 2403.17921.
"""

perplexity = Divergence("perplexity", "nats per token", _nothing, _negative_log_likelihood)
"""Negative log-likelihood of the text itself. The reference is the id that each token is to predict, -1 for none, which
counts 0; `Bench` puts it in place of what comes from the whole model's logits."""

task = Divergence("task", "nats per answer token", _nothing, _negative_log_likelihood)
"""The same, of the answers of labelled examples alone."""

DIVERGENCES = {d.name: d for d in (js, kl, js_official, angular, norm)}
OBJECTIVES = DIVERGENCES | {d.name: d for d in (trajectory, perplexity, task)}
"""Whatever a search can minimise."""
