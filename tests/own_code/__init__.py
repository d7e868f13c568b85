"""A model with Python code of its own; the two other files are that code."""

import torch

from .modeling_own import OwnAttention, OwnConfig, OwnModel

__all__ = ["OwnAttention", "random_own"]


def random_own() -> OwnModel:
    """A fresh random one of 3 blocks; always the same."""
    torch.manual_seed(0)
    model = OwnModel(OwnConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.15)
    return model
