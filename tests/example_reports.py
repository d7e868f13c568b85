"""Reports of an execution that passes the gate of params.yaml; run as a script, the toy stages of the flow's tests."""

from __future__ import annotations

import sys
from pathlib import Path

from finercut.checkpoint.records import Claim, HealReport, ProveReport, PruneReport, QuantiseReport
from finercut.evaluation.records import EvaluateReport, Measured, TaskResult
from finercut.selection.records import SearchReport
from finercut.serving.records import EngineFigures, Spread, ThroughputReport
from finercut.sources.records import CalibrateReport, FetchReport
from pipelines import paths


def fetch() -> FetchReport:
    return FetchReport(
        source="toy",
        revision="0" * 40,
        sha256="1" * 64,
        model_type="llama",
        n_blocks=4,
        n_parameters=1000,
        weights_bytes=2000,
        dtype="bfloat16",
        vocab_size=400,
        max_position_embeddings=256,
    )


def calibrate() -> CalibrateReport:
    return CalibrateReport(
        source="toy",
        revision="0",
        n_documents=5,
        n_characters=500,
        n_samples=2,
        n_tokens=8,
        n_held_out_samples=2,
        calibration_sha256="2" * 64,
        held_out_sha256="3" * 64,
        tokenizer_sha256="4" * 64,
        bos=True,
    )


def search() -> SearchReport:
    return SearchReport(
        mode="exact",
        least_margin=None,
        largest_fall=0.0,
        error_probability=0.0,
        divergence="js",
        n_candidates=8,
        n_removals=2,
        removals=["2.attention", "3.mlp"],
        final_divergence=0.25,
        final_held_out_divergence=0.375,
        curves_part=False,
        evaluations=15,
        sublayer_passes=100,
        brute_force_sublayer_passes=200,
        resumed_after=0,
        seconds=1.5,
    )


def prune() -> PruneReport:
    return PruneReport(
        n_removals=2,
        removed=["2.attention", "3.mlp"],
        n_removed_sublayers=2,
        n_sublayers=8,
        shares={"sublayers": 0.25, "parameters": 0.2, "kv_cache": 0.125},
        divergence=0.25,
        held_out_divergence=0.375,
        whole_parameters=1000,
        pruned_parameters=800,
        whole_bytes=2000,
        pruned_bytes=1600,
        whole_kv_bytes_per_token=64,
        pruned_kv_bytes_per_token=56,
        sha256="5" * 64,
    )


def heal() -> HealReport:
    return HealReport(method="none", changed=[], sha256="5" * 64)


def quantise() -> QuantiseReport:
    return QuantiseReport(method="none", sha256="5" * 64)


def claim(**changes) -> Claim:
    settings = {
        "name": "prune",
        "statement": "equals the masked whole model",
        "holds": True,
        "figures": {"max_logit_difference": 0.0005, "max_logit_difference_cached": 0.00025, "n_tokens": 16},
        "limit": 0.001,
    }
    return Claim(**settings | changes)


def prove(**changes) -> ProveReport:
    settings = {
        "claims": [claim()],
        "sha256": "5" * 64,
        "engine": "toy",
        "torch_version": "2",
        "transformers_version": "5",
    }
    return ProveReport(**settings | changes)


def prove_whole() -> ProveReport:
    return prove(claims=[claim(name="serve_whole")], sha256="1" * 64)


def evaluate_whole() -> Measured:
    return Measured(
        sha256="1" * 64,
        dtype="bfloat16",
        perplexity=10.0,
        bits_per_byte=1.0,
        held_out_sha256="3" * 64,
        tasks={},
        lm_eval_version="0.4",
        transformers_version="5",
        torch_version="2",
    )


def evaluate(**changes) -> EvaluateReport:
    task = TaskResult(
        metric="acc",
        whole=0.8,
        whole_stderr=None,
        pruned=0.6,
        pruned_stderr=None,
        retention=0.75,
        n_samples=100,
        n_available=100,
        n_fewshot=0,
        generative=False,
        higher_is_better=True,
        smoke=True,
    )
    settings = {
        "note": "Smoke tasks, not published benchmarks.",
        "dtype": "bfloat16",
        "tasks": {"finercut_copying": task},
        "mean_retention": 0.75,
        "whole_perplexity": 10.0,
        "pruned_perplexity": 15.0,
        "perplexity_ratio": 1.5,
        "whole_bits_per_byte": 1.0,
        "pruned_bits_per_byte": 1.25,
        "lm_eval_version": "0.4",
    }
    return EvaluateReport(**settings | changes)


def throughput(**changes) -> ThroughputReport:
    figures = EngineFigures(
        output_tokens_per_s=Spread(median=100.0, low=99.0, high=101.0),
        ttft_s=Spread(median=0.1, low=0.1, high=0.1),
        tpot_s=Spread(median=0.01, low=0.01, high=0.01),
        kv_cache_tokens=1024,
        weights_gib=0.5,
    )
    settings = {
        "whole": figures,
        "pruned": figures,
        "speed_up": 1.25,
        "kv_cache_ratio": 1.125,
        "input_tokens": 8,
        "output_tokens": 8,
        "concurrency": 2,
        "n_warmups": 1,
        "n_rounds": 3,
        "engine": "toy",
        "torch_version": "2",
        "hardware": "toy",
        "dtype": "float32",
        "enforce_eager": True,
        "interleave": True,
    }
    return ThroughputReport(**settings | changes)


def write_model_reports() -> None:
    """Everything up to the pruned checkpoint, which is two files of text."""
    for report in (fetch, calibrate, search, prune, heal, quantise):
        report().write(paths.report(report.__name__))
    paths.CURVE.write_text(
        "step,sublayer,divergence,held_out_divergence\n1,2.attention,0.125,0.1\n2,3.mlp,0.25,0.375\n"
    )
    paths.FINAL.mkdir(parents=True)
    (paths.FINAL / "model.safetensors").write_text("weights")
    (paths.FINAL / "config.json").write_text("{}")


if __name__ == "__main__":
    if sys.argv[1] == "model":
        write_model_reports()
    elif sys.argv[1] == "evaluate":
        prove().write(paths.report("prove"))
        evaluate_whole().write(paths.report("evaluate_whole"))
        evaluate().write(paths.report("evaluate"))
    else:
        speed_up = float(Path("speed_up.txt").read_text())
        throughput(speed_up=speed_up).write(paths.report("throughput"))
    print(f"{sys.argv[1]}: 1/2 sublayers")
    print(f"toy stage {sys.argv[1]} done")
