"""What later stages would refuse hours from now, asked of vLLM, lm-eval and transformers once there is a model.

`fetch` asks; `finercut run` asks again after it where what the answer depends on has changed since.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finercut.checkpoint import quantise
from finercut.checkpoint.writing import as_stored, write_all_but_weights
from finercut.evaluation import samples
from finercut.model import tokenizer_files
from finercut.model.devices import device_of, dtype_of
from finercut.model.directory import ModelDirectory
from finercut.model.families import fixed_sublayers
from finercut.selection import depth, refit
from finercut.serving import claim, foresight, vllm_engine
from finercut.sublayers import Sublayer
from finercut.system.records import Environment
from finercut.system.staging import staged_file

from . import paths, search_job
from .params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("finercut")

_VERSIONS = ("finercut", "torch", "transformers", "tokenizers", "lm_eval", *vllm_engine.DISTRIBUTIONS)


def check(params: Params, model: ModelDirectory) -> list[str]:
    """Ask, unless the answer is known that nothing is in the way, and warn of obstacles.

    Returns:
        Why stages will fail here, or what could not be asked. Another machine may have what they need.

    Raises:
        ValueError: the model or params.yaml would be refused on any machine.
    """
    asked = _asked(params, model)
    if paths.FORESEEN.is_file() and paths.FORESEEN.read_text(encoding="utf-8") == asked:
        return []
    started = time.monotonic()
    obstacles = _obstacles(params, model)
    for obstacle in obstacles:
        logger.warning("fetch: LATER STAGES WILL FAIL: %s", obstacle)
    logger.info("fetch: asked whether later stages can finish, in %.0f s", time.monotonic() - started)
    if not obstacles:
        with staged_file(paths.FORESEEN) as file:
            file.write_text(asked, encoding="utf-8")
    return obstacles


def _asked(params: Params, model: ModelDirectory) -> str:
    """Hash of the settings, files and versions that the answer depends on."""
    digest = hashlib.sha256()
    tolerances = {"logit_tolerance", "log_probability_tolerance", "quantised_tolerance"}
    budget = params.prune.budget
    for section in (params.search, budget, params.evaluate, params.throughput, params.prove, params.quantise):
        digest.update(section.model_dump_json(exclude=tolerances).encode())
    windows = f"{params.calibrate.n_tokens} {params.calibrate.n_samples}"
    digest.update(f"{windows} {_devices(params)} {_refits(params)} {params.heal.method} {_machine()}".encode())
    for file in sorted(model.path.rglob("*")):
        if file.is_file() and ".safetensors" not in file.name:
            digest.update(f"{file.relative_to(model.path)} {file.stat().st_size}\n".encode() + file.read_bytes())
    for name in _VERSIONS:
        try:
            digest.update(f"{name} {version(name)}\n".encode())
        except PackageNotFoundError:
            continue
    return digest.hexdigest()


def _machine() -> str:
    """What of it decides whether engines start. Nothing here makes a context on a GPU, which a flow's process would
    keep as long as it runs."""
    hardware = Environment.read(paths.ENVIRONMENT).hardware if paths.ENVIRONMENT.is_file() else None
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None
    return f"{hardware} {torch.cuda.device_count()} {dtype_of('auto', torch.device('cpu'))} {shared}"


def _devices(params: Params) -> dict[str, str]:
    sections = {name: getattr(params, name) for name in ("search", "heal", "quantise", "prove", "evaluate")}
    return {name: section.device for name, section in sections.items() if hasattr(section, "device")}


def _refits(params: Params) -> bool:
    return params.heal.method == "refit" or params.search.refit is not None


def _obstacles(params: Params, model: ModelDirectory) -> list[str]:
    found = []
    if _refits(params) or params.heal.method == "reconstruct":
        depth.check(model.config)
    if _refits(params):
        refit.check(model.layout, model.config.model_type)
    try:
        search_job.check(params, model)
    except (ValueError, FileNotFoundError) as error:
        found.append(f"search: {error}")
    for name, device in _devices(params).items():
        try:
            device_of(device)
        except ValueError as error:
            found.append(f"{name}.device: {error}")
    if params.evaluate.tasks:
        from finercut.evaluation.harness import load_tasks, rehearse

        try:
            tasks = load_tasks(params.evaluate.tasks)
        except RuntimeError as error:
            found.append(f"evaluate: {error}")
        else:
            sizes = {"vocab_size": model.language.vocab_size, "n_positions": model.context}
            rehearse(model.tokenizer, tasks, **sizes)
    samples.check(params.evaluate.samples, model)
    with tempfile.TemporaryDirectory(prefix="finercut-") as folder:
        pruned = ModelDirectory(folder)
        without_weights = write_all_but_weights(model, _one_of_each(model), pruned.path, {})
        found += _asked_of_vllm(params, model, pruned, without_weights)
        if params.quantise.method != "none":
            quantise.check_own_code(model)
            quantise.check_shapes(without_weights, params.quantise)
            found += _unquantisable(params)
    return found


def _unquantisable(params: Params) -> list[str]:
    found = []
    try:
        quantise.check_installed()
    except RuntimeError as error:
        found.append(f"quantise: {error}")
    try:
        asked = quantise.quantization_config(params.quantise)
        n_bits = quantise.scheme(params.quantise)["weights"]["num_bits"]
        refusal = foresight.ask_scheme(asked, n_bits, params.throughput.engine.dtype)
    except RuntimeError as error:
        return [*found, f"whether vLLM serves quantise.scheme {params.quantise.scheme} was not checked: {error}"]
    if refusal:
        found.append(
            f"vLLM does not serve quantise.scheme {params.quantise.scheme} on this machine: {refusal}; take another, "
            "or method none"
        )
    return found


def _asked_of_vllm(
    params: Params, model: ModelDirectory, pruned: ModelDirectory, without_weights: PreTrainedModel
) -> list[str]:
    compared = claim.engine_settings(model, params.calibrate.n_tokens, params.prove)
    alone = compared.model_copy(update={"tensor_parallel_size": 1, "pipeline_parallel_size": 1})
    engines = {None: alone, "prove": compared, "throughput": params.throughput.engine}
    if compared == alone:
        del engines["prove"]
    try:
        vllm_engine.check_servable(model)
        answers = foresight.ask(questions(model, pruned.path, without_weights), list(engines.values()))
    except RuntimeError as error:
        return [f"whether vLLM serves the model was not checked, and without vLLM nothing is registered: {error}"]
    except ValueError as error:
        return [str(error)]
    for what, answer in zip(("the model", "the model less some sublayers"), answers, strict=True):
        for section, refusal in zip(engines, answer.refusals, strict=True):
            if refusal is None:
                continue
            if section is not None:
                raise ValueError(f"vLLM does not serve {what} as {section} in params.yaml asks: {refusal}")
            return [
                f"vLLM does not serve {what}, so that it cannot be registered; `dvc repro evaluate` does all the rest. "
                f"It says: {refusal}"
            ]
        if answer.tokenizer is not None:
            expected, where = tokenizer_files.sample(model.tokenizer), f"vLLM loads the tokenizer of {what}"
            tokenizer_files.check_sample(expected, answer.tokenizer, where)
    return []


def questions(model: ModelDirectory, pruned: Path, without_weights: PreTrainedModel) -> list[foresight.Asked]:
    """The model, and it less some sublayers.

    Args:
        pruned: the latter's directory.
        without_weights: the latter, as `write_all_but_weights` returns it.
    """
    # Of what lies around a language model vLLM may leave out parts that do not matter.
    inside = f"{model.layout.blocks}." if model.language is not model.config else ""
    parameters = {name: p for name, p in without_weights.named_parameters() if name.startswith(inside)}
    computing = as_stored(without_weights, parameters).keys()
    left = {
        name: list(tensor.shape) for name, tensor in as_stored(without_weights, without_weights.state_dict()).items()
    }
    whole = {name: list(tensor.shape) for name, tensor in model.tensors.items()}
    return [foresight.Asked(model.path, whole, computing), foresight.Asked(pruned, left, computing)]


def _one_of_each(model: ModelDirectory) -> list[Sublayer]:
    """A sublayer of each sort that the model's blocks have, none that must stay; not every attention."""
    n_blocks = model.language.num_hidden_layers
    here, fixed = model.layout.sublayers(n_blocks), fixed_sublayers(model.config)
    free = [s for s in here if s not in fixed]
    sorts = {model.layout.branch(s.kind, s.block): s for s in free}
    chosen = sorted(sorts.values())
    n_attentions = sum(s.kind == "attention" for s in here)
    while sum(s.kind == "attention" for s in chosen) >= n_attentions:
        chosen.remove(next(s for s in chosen if s.kind == "attention"))
    if not chosen:
        raise ValueError(f"the model in {model} has no sublayer that could be removed")
    return chosen
