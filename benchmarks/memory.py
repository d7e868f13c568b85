"""Whether stages finish a model larger than the memory they may take: pruning, the proof, evaluation.

    python benchmarks/memory.py [--device cuda] [--limit-mib 256] [--times 4] [--blocks 48]

A random Llama of `--times` the limit, in bfloat16, in a temporary directory. Each stage works in a process of its own
that the system gives no more memory than the limit beyond what it has after its imports; pages of files do not count,
which the system drops as it needs. On a GPU the limit is of the memory for weights there. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from streaming import _peak_bytes
from transformers import LlamaConfig, LlamaForCausalLM

import finercut
from finercut.checkpoint.parity import check_parity
from finercut.evaluation.harness import fit
from finercut.model.directory import ModelDirectory
from finercut.model.loading import load_on
from finercut.model.tensors import weights_bytes

# Of the limit, what may hold weights; the rest is for activations, logits and what is read from files.
FOR_WEIGHTS = 0.6
HIDDEN, VOCABULARY, TOKENS = 512, 512, 32


class Words:
    """Enough of a tokenizer to count bytes."""

    def decode(self, tokens: Any, **_: Any) -> str:
        return " " * len(tokens)


def main() -> None:
    arguments = _arguments()
    if arguments.stage is not None:
        print(json.dumps(_limited(arguments.stage, arguments.directory, arguments)))
        return
    with tempfile.TemporaryDirectory(prefix="finercut-memory-") as directory:
        _write_model(Path(directory) / "whole", arguments)
        print("stage | weights MiB | limit MiB | memory rose by MiB | s | finished", flush=True)
        rows = []
        for stage in STAGES:
            rows.append(_in_own_process(stage, directory))
            print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("stage", "directory")}
    print(json.dumps({"rows": rows, **settings, "torch": torch.__version__, "transformers": transformers.__version__}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--limit-mib", type=int, default=256)
    parser.add_argument("--times", type=float, default=4, help="the limit: size of the weights")
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _write_model(directory: Path, arguments: argparse.Namespace) -> None:
    attention = 4 * HIDDEN**2
    a_block = arguments.times * arguments.limit_mib * 2**20 / 2 / arguments.blocks
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=math.ceil((a_block - attention) / (3 * HIDDEN)),
        num_hidden_layers=arguments.blocks,
        num_attention_heads=HIDDEN // 64,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="200MB")


def _tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def _prune(directory: Path, arguments: argparse.Namespace) -> None:
    finercut.prune(directory / "whole", ["1.attention", "2.mlp"], None, directory / "pruned")


def _prove(directory: Path, arguments: argparse.Namespace) -> None:
    pair = ModelDirectory(directory / "whole"), ModelDirectory(directory / "pruned")
    found = check_parity(*pair, _tokens(), 1e-3, torch.device(arguments.device), _weights_gib(arguments))
    assert found.passed, found


def _evaluate(directory: Path, arguments: argparse.Namespace) -> None:
    model = load_on(directory / "pruned", torch.float32, arguments.device, _weights_gib(arguments))
    fit(model, Words(), _tokens())


STAGES: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "prune": _prune,
    "prove": _prove,
    "evaluate": _evaluate,
}


def _weights_gib(arguments: argparse.Namespace) -> float:
    return FOR_WEIGHTS * arguments.limit_mib / 1024


def _in_own_process(stage: str, directory: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage, "--directory", directory]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{stage}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _limited(stage: str, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    torch.ones(256, 256) @ torch.ones(256, 256)  # starts its threads, whose stacks count
    n_bytes = arguments.limit_mib * 2**20
    if device.type == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + n_bytes, resource.RLIM_INFINITY))
    started, finished = time.perf_counter(), True
    with _peak_bytes(device) as rose:
        try:
            STAGES[stage](directory, arguments)
        except (MemoryError, RuntimeError) as error:
            if "allocate" not in f"{error}{type(error).__name__}":
                raise
            finished = False
    return {
        "stage": stage,
        "weights_mib": weights_bytes(directory / "whole") / 2**20,
        "limit_mib": arguments.limit_mib,
        "rose_mib": rose() / 2**20,
        "s": time.perf_counter() - started,
        "finished": finished,
    }


def _data_bytes() -> int:
    """Private memory that the process has asked for, as RLIMIT_DATA counts it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))


if __name__ == "__main__":
    main()
