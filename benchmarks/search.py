"""What the search costs, beside the authors' way and brute force: `python benchmarks/search.py`.

Every method runs in a process of its own, one at a time, on the same model, tokens and machine; rounds of all methods
follow each other, so that whatever else the machine does slows all alike. Loading and one warm-up forward are not
timed. Prints a table; the last line is one JSON document.

Work is counted in full forwards of one window: a method's matrix products over those of a forward. `limit` is how many
times faster than the authors' way a method would be if its products ran at the machine's measured peak and nothing else
took time. With --device cuda the authors' way runs on the GPU too and keeps its logits in main memory, as theirs does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from finercut.model.costs import costs_of_config
from finercut.model.loading import load_whole
from finercut.model.masking import masked
from finercut.selection.divergence import js
from finercut.selection.greedy import search
from finercut.sublayers import Candidate, candidates
from finercut.tokens import load_tokens

METHODS = ("authors", "brute", "exact", "lazy", "racing")
SHARE = 0.25
# Less work than full forwards, as measured on SmolLM2-135M: for the estimate alone.
LESS_WORK = {"brute": 1.6, "exact": 2.1, "lazy": 3.8, "racing": 3.8}

BASE = {"n_blocks": 8, "hidden": 128, "n_windows": 4, "n_tokens": 32, "vocabulary": 2048}
GROWTH = {
    "n_blocks": (4, 8, 16),
    "hidden": (64, 128, 256),
    "n_windows": (4, 16, 64),
    "n_tokens": (16, 32, 128),
    "vocabulary": (1024, 2048, 16384),
}
QUICK = {"n_blocks": 4, "hidden": 64, "n_windows": 4, "n_tokens": 16, "vocabulary": 256}


def authors(model: PreTrainedModel, tokens: Tensor, n_removals: int) -> Iterator[tuple[str, float]]:
    """Each candidate by full forwards of the masked float32 model, all logits kept on the CPU.

    Written from the paper's description; yields each removal and its divergence.
    """
    model = model.float()
    left: list[Candidate] = candidates(model.config.num_hidden_layers)
    gone: list[Candidate] = []

    def logits(without: list[Candidate]) -> Tensor:
        with masked(model, [s for c in without for s in c.sublayers]):
            return torch.cat([model(window[None], use_cache=False).logits.float().cpu() for window in tokens])

    whole = logits([])
    for _ in range(n_removals):
        values = {c: js(whole, logits([*gone, c])).mean().item() for c in left}
        best = min(left, key=values.__getitem__)
        left.remove(best)
        gone.append(best)
        yield str(best), values[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("artifacts/model"))
    parser.add_argument("--calibration", type=Path, default=Path("artifacts/calibration"))
    parser.add_argument("--windows", type=int, default=4, help="calibration windows for --model")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of all methods but the authors', which is float32",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="for --model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="of the random models")
    parser.add_argument("--model-rounds", type=int, default=1, help="of all but brute force on --model")
    parser.add_argument("--timed-steps", type=int, default=1, help="of the authors' way on --model; the rest follows")
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/search-cost.png"))
    parser.add_argument("--only", choices=("random", "model"), help="one half of the comparison")
    parser.add_argument("--quick", action="store_true", help="one tiny random model, in this process; no picture")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.job is not None:
        print(json.dumps(run_job(json.loads(chosen.job))))
        return
    document = benchmark(chosen)
    print(table(document))
    print(json.dumps(document))


def benchmark(chosen: argparse.Namespace) -> dict[str, Any]:
    machine = environment(chosen)
    document: dict[str, Any] = {"environment": machine}
    if chosen.quick:
        document["random_models"] = random_models([QUICK], 1, chosen)
        return document
    if chosen.only != "random":
        document["model"] = real_model(chosen)
        on_cpu = machine["gflops_a_core"][chosen.dtype] * chosen.threads
        limits(document["model"]["methods"], machine.get("gflops", on_cpu))
    if chosen.only != "model":
        from finercut.report.pictures import cost_curves

        points = document["random_models"] = random_models(list(distinct_shapes()), chosen.rounds, chosen)
        cost_curves({name: growth(points, name) for name in GROWTH}, chosen.picture)
    return document


def distinct_shapes() -> Iterator[dict[str, int]]:
    yield BASE
    for name, sizes_ in GROWTH.items():
        yield from (BASE | {name: size} for size in sizes_ if size != BASE[name])


def growth(points: list[dict[str, Any]], name: str) -> dict[str, list[tuple[int, float]]]:
    """CPU seconds over one dimension, for each method."""
    along = [p for p in points if all(p["shape"][other] == size for other, size in BASE.items() if other != name)]
    return {
        method: sorted((p["shape"][name], p["methods"][method]["cpu_s"]["median"]) for p in along) for method in METHODS
    }


def random_models(shapes: list[dict[str, int]], n_rounds: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    rounds: dict[str, list[list[dict[str, Any]]]] = {method: [] for method in METHODS}
    for _ in range(n_rounds):
        for method in METHODS:
            job = {"method": method, "shapes": shapes, "dtype": "float32", "threads": chosen.threads}
            rounds[method].append(run_job(job) if chosen.quick else in_process(job))
    points = []
    for i, shape in enumerate(shapes):
        runs = {method: [results[i] for results in rounds[method]] for method in METHODS}
        points.append({"shape": shape, "methods": summary(runs)})
    return points


def real_model(chosen: argparse.Namespace) -> dict[str, Any]:
    job = {
        "model": str(chosen.model.resolve()),
        "calibration": str(chosen.calibration.resolve()),
        "n_windows": chosen.windows,
        "n_tokens": chosen.tokens,
        "dtype": chosen.dtype,
        "device": chosen.device,
        "threads": chosen.threads,
    }
    seconds = estimate_s(chosen, *forward_s(job))
    print(f"{chosen.model}: about {seconds / 60:.0f} min, more on a busy machine", file=sys.stderr, flush=True)
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for number in range(chosen.model_rounds):
        for method in METHODS:
            if number == 0 or method != "brute":
                runs[method] += in_process(job | {"method": method, "timed_steps": chosen.timed_steps})
    return {"n_windows": chosen.windows, "n_tokens": chosen.tokens, "methods": summary(runs)}


def limits(methods: dict[str, dict[str, Any]], gflops: float) -> None:
    """Add to each method what it would gain on the authors' way at the machine's peak of `gflops`."""
    for figures in methods.values():
        figures["limit"] = methods["authors"]["wall_s"]["median"] / (figures["gflop"] / gflops)


def forward_s(job: dict[str, Any]) -> tuple[float, int]:
    """Of one window in float32, and how many sublayers it goes through."""
    torch.set_num_threads(job["threads"])
    model, tokens = load_whole(Path(job["model"]), torch.float32, job["device"]), calibration_tokens(job)
    with torch.inference_mode():
        model(tokens[:1], use_cache=False)
        started = time.perf_counter()
        for window in tokens:
            model(window[None], use_cache=False).logits.cpu()
    return (time.perf_counter() - started) / len(tokens), 2 * model.config.num_hidden_layers


def estimate_s(chosen: argparse.Namespace, forward: float, n_sublayers: int) -> float:
    """Of all jobs on --model; the authors' way spends another fifth of its forwards' time on the divergence."""
    n_forwards = [chosen.windows * (n_sublayers - step) for step in range(int(SHARE * n_sublayers))]
    seconds = {method: sum(n_forwards) / less * forward for method, less in LESS_WORK.items()}
    seconds["authors"] = 1.2 * sum(n_forwards[: chosen.timed_steps]) * forward
    return chosen.model_rounds * sum(seconds.values()) - (chosen.model_rounds - 1) * seconds["brute"]


def in_process(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one method in a process of its own: it has all of that process's memory to itself."""
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
        done = subprocess.run(command, stdout=output, env=environment)
        if done.returncode:
            where = job.get("model", "the random models")
            raise SystemExit(f"search.py: {job['method']} on {where} failed with status {done.returncode}, see above")
        output.seek(0)
        results = json.loads(output.read().splitlines()[-1])
    for result in results:
        print(f"{job['method']}: {result['wall_s']:.1f} s, {result['cpu_s']:.1f} s of CPU", file=sys.stderr, flush=True)
    return results


def run_job(job: dict[str, Any]) -> list[dict[str, Any]]:
    torch.set_num_threads(job["threads"])
    if "model" in job:
        dtype = torch.float32 if job["method"] == "authors" else getattr(torch, job["dtype"])
        model = load_whole(Path(job["model"]), dtype, job["device"])
        return [measured(job["method"], model, calibration_tokens(job), job["timed_steps"])]
    return [measured(job["method"], *random_model(shape)) for shape in job["shapes"]]


def calibration_tokens(job: dict[str, Any]) -> Tensor:
    tokens = load_tokens(Path(job["calibration"])).calibration[: job["n_windows"], : job["n_tokens"]]
    return tokens.to(job["device"])


def random_model(shape: dict[str, int]) -> tuple[PreTrainedModel, Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=3 * shape["hidden"],
        num_hidden_layers=shape["n_blocks"],
        num_attention_heads=shape["hidden"] // 32,
        num_key_value_heads=shape["hidden"] // 32,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, torch.randint(shape["vocabulary"], (shape["n_windows"], shape["n_tokens"]))


def measured(method: str, model: PreTrainedModel, tokens: Tensor, timed_steps: int | None = None) -> dict[str, Any]:
    """One search. The authors' way may be stopped after some steps: what the others would take follows from these."""
    n_sublayers = 2 * model.config.num_hidden_layers
    n_removals = int(SHARE * n_sublayers)
    n_steps = min(n_removals, timed_steps or n_removals) if method == "authors" else n_removals
    # Full forwards of every candidate.
    full = [len(tokens) * (n_sublayers - step) for step in range(n_removals)]
    with torch.inference_mode():
        model(tokens[:1], use_cache=False)
        before = peak_mib(model.device)
        wall, cpu = time.perf_counter(), time.process_time()
        if method == "authors":
            removals = list(authors(model, tokens, n_steps))
            passes = sum(f * (n_sublayers - 1 - step) for step, f in enumerate(full))
            head_tokens = sum(full) * tokens.shape[1]
        else:
            found = list(search(model, tokens, tokens[:1], n_removals, mode=method))
            removals = [(r.sublayer, r.divergence) for r in found]
            passes = sum(r.sublayer_passes for r in found)
            head_tokens = sum(r.head_tokens for r in found)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    scale = sum(f * (n_sublayers - 1 - s) for s, f in enumerate(full)) / sum(
        f * (n_sublayers - 1 - s) for s, f in enumerate(full[:n_steps])
    )
    scale = scale if method == "authors" else 1.0
    return {
        "order": [name for name, _ in removals],
        "divergences": [value for _, value in removals],
        "wall_s": wall * scale,
        "cpu_s": cpu * scale,
        "timed_steps": n_steps,
        "n_removals": n_removals,
        "sublayer_passes": passes,
        "head_tokens": head_tokens,
        "forward_equivalents": forward_equivalents(model, passes, head_tokens, tokens.shape[1]),
        "gflop": gflop(model, passes, head_tokens, tokens.shape[1]),
        "peak_mib": peak_mib(model.device),
        "peak_above_model_mib": peak_mib(model.device) - before,
    }


def forward_equivalents(model: PreTrainedModel, passes: int, head_tokens: int, n_tokens: int) -> float:
    """Matrix products of so many passes and head tokens, in full forwards of one window."""
    n_sublayers = 2 * model.config.num_hidden_layers
    return gflop(model, passes, head_tokens, n_tokens) / gflop(model, n_sublayers, n_tokens, n_tokens)


def gflop(model: PreTrainedModel, passes: int, head_tokens: int, n_tokens: int) -> float:
    """Of the weights' matrix products in so many passes and head tokens; attention's own products not counted."""
    sublayer = statistics.mean(costs_of_config(model.config)["parameters"].by_sublayer.values())
    head = model.get_output_embeddings().weight.numel()
    return 2e-9 * (passes * n_tokens * sublayer + head_tokens * head)


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians and spreads over rounds, and how each method does against the authors' and against brute force."""
    brute, slow = runs["brute"][0], runs["authors"]

    def faster(name: str, rounds: list[dict[str, Any]]) -> dict[str, float]:
        return spread([theirs[name] / ours[name] for theirs, ours in zip(slow * len(rounds), rounds, strict=False)])

    found = {}
    for method, rounds in runs.items():
        first = rounds[0]
        found[method] = {
            **{name: spread([r[name] for r in rounds]) for name in ("wall_s", "cpu_s", "peak_above_model_mib")},
            **{name: first[name] for name in ("timed_steps", "n_removals", "sublayer_passes", "head_tokens", "gflop")},
            "forward_equivalents": first["forward_equivalents"],
            "peak_mib": max(r["peak_mib"] for r in rounds),
            "less_work": slow[0]["forward_equivalents"] / first["forward_equivalents"],
            "fewer_passes": slow[0]["sublayer_passes"] / first["sublayer_passes"],
            "faster_wall": faster("wall_s", rounds),
            "faster_cpu": faster("cpu_s", rounds),
            "same_order": all(r["order"] == brute["order"][: len(r["order"])] for r in rounds),
            "largest_difference": max(
                abs(ours - theirs)
                for r in rounds
                for ours, theirs in zip(r["divergences"], brute["divergences"], strict=False)
            ),
            "order": first["order"],
        }
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def peak_mib(device: torch.device) -> float:
    """Of the GPU's memory, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def environment(chosen: argparse.Namespace) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    on_gpu = {}
    if chosen.device == "cuda":
        on_gpu = {"gpu": torch.cuda.get_device_name(), "gflops": gpu_gflops(getattr(torch, chosen.dtype))}
    return {
        **on_gpu,
        "cpu": cpu.get("model name", platform.machine()),
        "n_cpus": os.cpu_count(),
        "threads": chosen.threads,
        "load_average": os.getloadavg()[0],
        "avx512_bf16": "avx512_bf16" in cpu.get("flags", "").split(),
        "gflops_a_core": {name: matmul_gflops(getattr(torch, name), chosen.quick) for name in ("float32", "bfloat16")},
        "dtype": chosen.dtype,
        "rounds": chosen.rounds,
        "model_rounds": chosen.model_rounds,
        "warm_up": "one forward, not timed; loading not timed",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def matmul_gflops(dtype: torch.dtype, quick: bool) -> float:
    """Of one core, in CPU time: what others do on the machine does not count."""
    size = 256 if quick else 1024
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a @ b
    times = []
    for _ in range(5):
        started = time.process_time()
        a @ b
        times.append(time.process_time() - started)
    torch.set_num_threads(threads)
    return 2 * size**3 / statistics.median(times) / 1e9


def gpu_gflops(dtype: torch.dtype) -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        a @ b
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return 2 * 8192**3 / statistics.median(times) / 1e9


def table(document: dict[str, Any]) -> str:
    machine = document["environment"]
    gpu = f"{machine['gpu']}, {machine['gflops'] / 1e3:.0f} TFLOP/s in {machine['dtype']}; " if "gpu" in machine else ""
    lines = [
        gpu
        + f"{machine['cpu']}, {machine['threads']} of {machine['n_cpus']} cores, load {machine['load_average']:.1f}; "
        + ", ".join(f"{name} {peak:.0f} GFLOP/s" for name, peak in machine["gflops_a_core"].items())
        + f" a core; torch {machine['torch']}, transformers {machine['transformers']}",
    ]
    points = document.get("random_models", [])
    groups = [(" ".join(f"{k}={v}" for k, v in p["shape"].items()), p["methods"]) for p in points]
    if "model" in document:
        model = document["model"]
        groups.append((f"the model, {model['n_windows']} windows of {model['n_tokens']} tokens", model["methods"]))
    for title, methods in groups:
        lines += [
            "",
            title,
            f"{'':9}{'wall s':>9}{'spread':>16}{'CPU s':>9}{'passes':>9}{'forwards':>10}{'less work':>11}"
            f"{'x wall':>8}{'x CPU':>7}{'limit':>7}{'MiB':>7}  order",
        ]
        lines += [row(method, figures) for method, figures in methods.items()]
    return "\n".join(lines)


def row(method: str, figures: dict[str, Any]) -> str:
    wall = figures["wall_s"]
    return (
        f"{method:9}{wall['median']:9.1f}{wall['low']:8.1f}-{wall['high']:<7.1f}{figures['cpu_s']['median']:9.1f}"
        f"{figures['sublayer_passes']:9d}{figures['forward_equivalents']:10.0f}{figures['less_work']:11.1f}"
        f"{figures['faster_wall']['median']:8.1f}{figures['faster_cpu']['median']:7.1f}"
        f"{figures.get('limit', float('nan')):7.1f}{figures['peak_above_model_mib']['median']:7.0f}  "
        + ("same" if figures["same_order"] else "OTHER")
        + (f" (first {figures['timed_steps']} steps timed)" if figures["timed_steps"] < figures["n_removals"] else "")
    )


if __name__ == "__main__":
    main()
