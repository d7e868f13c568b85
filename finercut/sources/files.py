"""Chooses which files of a model are taken, and copies them; finds the files that paths and patterns name."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from finercut.model.configs import TEMPLATES, VOCABULARY_FILES, read_object
from finercut.model.families import check_supported
from finercut.model.remote_code import OUR_FILES, TRUSTED_KEY
from finercut.model.tensors import INDEX, PICKLED, WEIGHTS, shards

TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_OTHER_FILES = ("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_ADAPTER = "adapter_config.json"
# What its licence asks to travel with a model, and the card that names the licence.
LEGAL = re.compile(
    r"[^/]*(licen[cs]e|notice|copying|copyright|use[_ -]policy|acceptable[_ -]use|terms[_ -]of|eula|patents)[^/]*"
    r"(?<!\.py)(?<!\.json)(?<!\.safetensors)|readme\.md",
    re.IGNORECASE,
)
_POINTER = b"version https://git-lfs.github.com/spec/"
_TEMPLATE = re.compile(rf"{TEMPLATES}/[^/]+\.jinja")


@dataclass(frozen=True)
class Code:
    """Whether the source says that a model's own Python code is trusted, and what it has to say for that."""

    trusted: bool
    to_trust: str


def copy(path: Path, directory: Path, code: Code, dequantised: bool, link: bool = False) -> list[str]:
    """Fill `directory` with the model in `path`; returns the names of the files taken.

    Args:
        dequantised: whether quantised weights will be dequantised; they are refused otherwise.
        link: hard-link the weights where the file system can; for a cache whose weights nobody edits in place.
    """
    taken = choose(names_in(path), str(path), code.trusted, path / INDEX)
    root = path.resolve()
    if root.parent.name == "snapshots":  # of the Hugging Face cache, which keeps the files in a folder beside it
        root = root.parent.parent
    for name in taken:
        if not (path / name).resolve().is_relative_to(root):
            raise ValueError(f"{path / name} is a link to a file outside {path}: put the file itself there")
        with (path / name).open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError(
                    f"{path / name} is a pointer of Git LFS and not the file: run `git lfs pull` in {path}"
                )
    check_config(path / "config.json", str(path), code, dequantised)
    for name in taken:
        (directory / name).parent.mkdir(exist_ok=True)
        # Never config.json, which later steps write to: a link would carry that into the cache.
        _transfer((path / name).resolve(), directory / name, link and name.endswith(".safetensors"))
    return taken


def names_in(path: Path) -> list[str]:
    """Names of the files in a model's directory that may be taken, named templates in their folder among them."""
    return [str(file.relative_to(path)) for file in (*path.iterdir(), *path.glob(f"{TEMPLATES}/*")) if file.is_file()]


def matching(paths: Iterable[Path]) -> list[Path]:
    """The files that paths or patterns of them, such as texts/*.txt, name: those of a pattern by name, none twice.

    Raises:
        FileNotFoundError: one names no file.
    """
    found: dict[Path, None] = {}
    for path in paths:
        named = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in named if file.is_file()]
        if not files:
            folder = f", it is a folder: name its files, as {path / '*.txt'} does" if path.is_dir() else ""
            raise FileNotFoundError(f"the paths in calibrate: no file {path}{folder}")
        found |= dict.fromkeys(files)
    return list(found)


def needs_index(names: Collection[str]) -> bool:
    """Whether the weights are those that an index names."""
    return INDEX in names and WEIGHTS not in names


def _transfer(source: Path, target: Path, link: bool) -> None:
    # A user's own files are copied: DVC makes its outputs read-only links into its cache, and a later edit of the
    # original would change both.
    if link:
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def choose(names: Collection[str], where: str, trusted: bool, index: Path) -> list[str]:
    """Which of a model's files are taken; sorted. No folder is looked into but that of named chat templates.

    Args:
        index: the file that names the shards; read if `needs_index`.
    """
    templates = [n for n in names if _TEMPLATE.fullmatch(n)]
    names = [n for n in names if "/" not in n]
    if "config.json" not in names:
        hint = "; a GGUF file is taken from a package only" if any(n.endswith(".gguf") for n in names) else ""
        raise FileNotFoundError(f"{where} has no config.json: it is no model in Hugging Face layout{hint}")
    if _ADAPTER in names:
        raise ValueError(
            f"{where} has an adapter ({_ADAPTER}), which transformers would load with the weights: merge it into them "
            "(peft's merge_and_unload, then save_pretrained) and take that, or take the adapter's files out"
        )
    if WEIGHTS in names:
        weights = [WEIGHTS]
    elif needs_index(names):
        weights = [INDEX, *shards(index)]
        if strangers := sorted(n for n in weights[1:] if n not in names or not n.endswith(".safetensors")):
            absent = "" if strangers[0] in names else ": the file is not there, get all of the model"
            raise ValueError(f"{where}: {INDEX} names {strangers[0]!r}, which is not a shard of the model{absent}")
    else:
        pickled = [n for n in names if any(fnmatch(n, pattern) for pattern in PICKLED)]
        why = f"only pickled weights ({pickled[0]}), which can run code when loaded" if pickled else "no weights"
        if others := sorted(n for n in names if n.endswith((".safetensors", ".gguf"))):
            why = (
                f"no weights but {others[0]}{f' and {len(others) - 1} more' if others[1:] else ''}, which nothing names"
            )
        raise ValueError(f"{where} has {why}: finercut takes {WEIGHTS}, or {INDEX} with its shards")
    if not any(n in names for n in VOCABULARY_FILES):
        raise FileNotFoundError(f"{where} has no tokenizer: one of {', '.join(VOCABULARY_FILES)} is needed")
    scripts = [n for n in names if n.endswith(".py")] if trusted else []
    if taken := sorted(set(scripts).intersection(OUR_FILES)):
        raise ValueError(f"{where} has a {taken[0]}, as finercut's own file is called: give it another name")
    fixed = {*TOKENIZER_FILES, *_OTHER_FILES, *_PROCESSOR_FILES}
    known = (n for n in names if n in fixed or LEGAL.fullmatch(n))
    return sorted([*weights, *scripts, *templates, *known])


def check_config(file: Path, where: str, code: Code, dequantised: bool) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    from finercut.model.directory import ModelDirectory

    config = read_object(file)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"the config.json of {where} is no model's: it names no model_type")
    if model_type.startswith("finercut_"):
        raise ValueError(f"{where} is a pruned model, {model_type}: take the whole one")
    if TRUSTED_KEY in config:
        raise ValueError(f"the config.json of {where} has {TRUSTED_KEY}, which only finercut may note: take it out")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        if "auto_map" in config:
            if code.trusted:
                return  # what its config says is not known before its code is run
            raise ValueError(
                f"{where} ({model_type}) needs Python code of its own, which is run only if fetch.source says that it "
                f"is trusted: read it, then write {code.to_trust}"
            )
        raise ValueError(f"{where} is a {model_type} model, which transformers knows no causal language model for")
    if code.trusted:
        raise ValueError(f"transformers has {model_type} itself, no code of {where} is run: take trust_remote_code out")
    try:
        check_supported(ModelDirectory(file.parent).config, dequantised=dequantised)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
