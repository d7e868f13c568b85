"""Settings of the methods of healing that suit tiny models."""

from __future__ import annotations

from finercut.healing.settings import Distill, Reconstruct, Refit

N = 24


def distilling(**changes):
    settings = {
        "method": "distill",
        "trainable": "blocks",
        "lora_rank": 8,
        "tokens": 16 * 4 * N,
        "minutes": None,
        "batch_tokens": 4 * N,
        "learning_rate": 1e-3,
        "warm_up": 0.1,
        "ce_weight": 0.0,
        "eval_every": 4,
        "patience": None,
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
    }
    return Distill(**settings | changes)


def refitting(**changes):
    settings = {"method": "refit", "ridges": [0.01, 0.1, 1.0], "fractions": [0.5, 1.0], "batch_tokens": 8 * N}
    return Refit(**settings | {"dtype": "float32", "device": "cpu"} | changes)


def reconstructing(**changes):
    settings = {"method": "reconstruct", "sublayers": "all", "ridges": [0.01, 0.1, 1.0], "steps": 20, "warm_up": 0.1}
    settings |= {"batch_tokens": 8 * N, "learning_rate": 3e-3, "eval_every": 5, "fractions": [0.5, 1.0], "seed": 0}
    return Reconstruct(**settings | {"dtype": "float32", "device": "cpu"} | changes)
