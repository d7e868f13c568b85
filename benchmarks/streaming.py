"""What streaming costs: the same passes of a search with all weights on the device and with two slots for them.

    python benchmarks/streaming.py [--device cuda] [--hidden 512] [--blocks 16] ...

Random Llamas in temporary directories. First memory: how far forwards of streamed models of growing depth raise it,
in a process of their own each. Then time: passes with all candidates under way, and with ever fewer as they are given
up, resident and streamed in turn, with what is fetched and the time that a transfer alone takes. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from finercut.model.families import layout_of
from finercut.model.loading import load_whole
from finercut.model.streaming import N_SLOTS, Stream, stream
from finercut.model.workers import Workers
from finercut.selection.blocks import Blocks
from finercut.selection.divergence import js
from finercut.selection.sweep import Sweep, micro_batch
from finercut.sublayers import Candidate, candidates

WARM_UPS = 1


def main() -> None:
    arguments = _arguments()
    if arguments.memory_of is not None:
        print(json.dumps(_memory(arguments.memory_of, arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="finercut-streaming-") as directory:
        depths = [arguments.blocks // 2, arguments.blocks, 2 * arguments.blocks]
        for depth in depths:
            _write_model(Path(directory) / str(depth), depth, arguments)
        memory = [_in_own_process(Path(directory) / str(depth)) for depth in depths]
        _table("blocks | weights MiB | slots MiB | memory rose by MiB", memory)
        times = _times(Path(directory) / str(arguments.blocks), arguments)
    _table(
        "candidates | tokens x sublayers | resident s | streamed s | ratio | spread | fetched MiB | fetch alone s",
        times,
    )
    hardware = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()} CPU"
    settings = {k: v for k, v in vars(arguments).items() if k != "memory_of"}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    threads = {"hardware": hardware, "threads": torch.get_num_threads()}
    print(json.dumps({"memory": memory, "times": times, "settings": settings} | threads | versions))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="in a window")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_model(directory: Path, n_blocks: int, arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 7 // 2,
        num_hidden_layers=n_blocks,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 256),
        dtype=arguments.dtype,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    model.save_pretrained(directory, max_shard_size="200MB")


def _streamed(directory: Path, arguments: argparse.Namespace) -> tuple[PreTrainedModel, Stream]:
    """With no room for any attention or MLP but the slots."""
    model = load_whole(directory, getattr(torch, arguments.dtype))
    layers = model.get_submodule(layout_of(model.config).blocks)
    parts = [part for layer in layers for part in (layer.self_attn, layer.mlp)]
    rest = _n_bytes([model]) - _n_bytes(parts)
    found = stream(model, torch.device(arguments.device), rest + N_SLOTS * max(_n_bytes([part]) for part in parts))
    return model, found


def _n_bytes(modules: Sequence[torch.nn.Module]) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def _in_own_process(directory: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", str(directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _memory(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    tokens = torch.zeros(1, arguments.tokens, dtype=torch.long, device=device)
    with torch.inference_mode(), _peak_bytes(device) as rose:
        model, brings = _streamed(directory, arguments)
        for _ in range(3):
            model(tokens, use_cache=False)
    return {
        "blocks": model.config.num_hidden_layers,
        "weights_mib": _n_bytes([model]) / 2**20,
        "slots_mib": brings.device_bytes / 2**20,
        "rose_mib": rose() / 2**20,
    }


@contextmanager
def _peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """How far memory rises within: allocated on a GPU; on a CPU, resident and not a page of a file."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    before, highest, over = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.002):
            highest = max(highest, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: highest - before
    finally:
        over.set()
        watcher.join()


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def _times(directory: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(arguments.device)
    resident = load_whole(directory, getattr(torch, arguments.dtype), device)
    streamed, brings = _streamed(directory, arguments)
    sweeps = [_sweep(model, arguments, device) for model in (resident, streamed)]
    pool, rows = candidates(arguments.blocks), []
    while pool:
        one, other = [], []
        for repeat in range(WARM_UPS + arguments.repeats):
            before = brings.bytes_brought
            taken = [_seconds(sweep, pool, device) for sweep in sweeps]
            fetched = brings.bytes_brought - before
            if repeat >= WARM_UPS:
                one.append(taken[0])
                other.append(taken[1])
        ratios = sorted(b / a for a, b in zip(one, other, strict=True))
        rows.append(
            {
                "candidates": len(pool),
                "token_passes": arguments.windows * arguments.tokens * sum(map(sweeps[0].passes, pool)),
                "resident_s": statistics.median(one),
                "streamed_s": statistics.median(other),
                "ratio": statistics.median(ratios),
                "spread": f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
                "fetched_mib": fetched / 2**20,
                "fetch_alone_s": fetched / _transfer_bytes_per_s(device),
            }
        )
        pool = pool[::4] if len(pool) > 1 else []
    return rows


def _sweep(model: PreTrainedModel, arguments: argparse.Namespace, device: torch.device) -> Sweep:
    shape = (arguments.windows, arguments.tokens)
    tokens = torch.randint(arguments.vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        blocks = Blocks(model, layout_of(model.config), tokens[:1])
    return Sweep(blocks, tokens, js, Workers(device), micro_batch(blocks, *shape))


def _seconds(sweep: Sweep, pool: Sequence[Candidate], device: torch.device) -> float:
    """Of one pass through the depth."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    sweep.totals({window: dict.fromkeys(pool, math.inf) for window in range(sweep.n_windows)})
    return time.perf_counter() - started


def _transfer_bytes_per_s(device: torch.device) -> float:
    """Of copies of one large tensor to the device, the way streaming makes them."""
    source = torch.ones(2**26, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        taken.append(time.perf_counter() - started)
    return source.nbytes / statistics.median(taken)


def _table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(title)
    for row in rows:
        print(" | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    print()


if __name__ == "__main__":
    main()
