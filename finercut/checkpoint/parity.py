"""Proof that a pruned checkpoint computes what the whole model does with the same sublayers masked."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finercut.checkpoint.records import ParityReport
from finercut.model.caches import forward
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load
from finercut.model.masking import masked

# Enough to reach every weight and many positions, little enough for seconds on a laptop.
N_SAMPLES = 4
N_TOKENS = 256
N_PROMPT_TOKENS = 16
N_CACHED_TOKENS = 48


def check_parity(
    whole: ModelDirectory,
    pruned: ModelDirectory,
    held_out: Tensor,
    tolerance: float,
    device: torch.device,
    weights_gib: float | None = None,
) -> ParityReport:
    """Compare logits in float32 over the first held-out windows; one model is in memory at a time.

    Args:
        held_out: token ids, (samples, tokens)
        tolerance: largest difference of two logits that passes
        weights_gib: of the device's memory, for a model's weights; None takes what they need.

    Raises:
        FileNotFoundError: a model is missing.
        ValueError: the pruned checkpoint is not one of ours, or of another model.
        RuntimeError: the logits of one of them are not finite.
    """
    windows = held_out[:N_SAMPLES, :N_TOKENS].to(device)
    if not pruned.written_by("prune").is_pruned:
        raise ValueError(f"{pruned} holds a {pruned.settings.get('model_type')} model, not a pruned one")
    of_pruned = _logits(load(pruned, torch.float32, device, weights_gib=weights_gib), windows)
    shapes = [(d.language.num_hidden_layers, d.language.vocab_size) for d in (whole.written_by("fetch"), pruned)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{pruned} was not pruned from {whole}: (blocks, vocabulary) are {shapes[1]}, not {shapes[0]}; run "
            "`finercut prune` again"
        )
    with masked(load(whole, torch.float32, device, weights_gib=weights_gib), pruned.removed) as model:
        of_whole = _logits(model, windows)
    for directory, logits in ((whole, of_whole), (pruned, of_pruned)):
        if not all(part.isfinite().all() for part in logits):
            raise RuntimeError(f"the float32 logits of {directory} are not finite: the checkpoint is damaged")
    uncached, cached = (_largest_difference(a, b) for a, b in zip(of_whole, of_pruned, strict=True))
    return ParityReport(
        passed=max(uncached, cached) <= tolerance,
        tolerance=tolerance,
        max_logit_difference=uncached,
        max_logit_difference_cached=cached,
        n_tokens=windows.numel(),
    )


@torch.inference_mode()
def _logits(model: PreTrainedModel, windows: Tensor) -> tuple[Tensor, Tensor]:
    """(samples, tokens, vocab) on the CPU, of one forward and of a prompt continued token by token with a KV cache."""
    uncached = torch.cat([model(window[None], use_cache=False).logits.cpu() for window in windows])
    output, cache = forward(model, windows[:, :N_PROMPT_TOKENS])
    cached = [output.logits.cpu()]
    for position in range(N_PROMPT_TOKENS, min(N_CACHED_TOKENS, windows.shape[1])):
        token = windows[:, position : position + 1]
        output, cache = forward(model, token, cache)
        cached.append(output.logits.cpu())
    return uncached, torch.cat(cached, dim=1)


def _largest_difference(whole: Tensor, pruned: Tensor) -> float:
    return (whole - pruned).abs().max().item()
