"""Python code that comes with a model: which of it is trusted, and what a pruned checkpoint carries of it.

A model that transformers has no code for is accepted only if params.yaml names the trusted code. `fetch` alone writes
the code's hash into config.json; later stages run the code only while it still has that hash.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finercut.model.configs import note, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRUSTED_KEY = "finercut_trusted_code"
"""Key of config.json: `code_sha256` of the directory when its code was trusted."""

PRUNED_FILE = "modeling_pruned.py"
OUR_FILES = ("modeling_finercut.py", PRUNED_FILE)
"""File names reserved for pruned checkpoints."""

_PRUNED = '''\
"""{model} less the sublayers its config lists as skipped. Written by finercut."""

from .{config_module} import {config}
from .{model_module} import {model}
from .modeling_finercut import pruned_config_class, pruned_model_class

{prefix}{config} = pruned_config_class({config}, __name__)
{prefix}{model} = pruned_model_class({model}, {prefix}{config}, __name__)
'''


def python_files(directory: Path) -> list[Path]:
    """The Python files beside config.json, sorted by name; folders are not searched."""
    return sorted(file for file in directory.glob("*.py") if file.is_file())


def code_sha256(directory: Path) -> str:
    """Over the sorted names and contents of the Python files beside config.json."""
    digest = hashlib.sha256()
    for file in python_files(directory):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def check_imports(directory: Path) -> None:
    """
    Raises:
        ValueError: the code imports from a folder: `code_sha256` is of the files beside config.json alone.
    """
    for file in python_files(directory):
        if found := re.search(r"^\s*from\s+\.(\w+)\.\w", file.read_text(encoding="utf-8"), re.MULTILINE):
            raise ValueError(
                f"{file.name} imports from the folder {found[1]}, and folders of code are not taken: put its files "
                "beside config.json"
            )


def note_trusted(directory: Path, sha256: str) -> None:
    """Record that later stages may run the code with this hash."""
    note(directory, TRUSTED_KEY, sha256)


def trusts_code(directory: Path) -> bool:
    """Whether transformers may run the Python files in `directory`. No other place decides that.

    Raises:
        ValueError: they were trusted, and have changed since; or its configs name code that lies elsewhere.
    """
    config = read_object(directory / "config.json")
    if TRUSTED_KEY not in config:
        return False
    if config[TRUSTED_KEY] != code_sha256(directory):
        raise ValueError(
            f"the Python files in {directory} are not those that were trusted when they were fetched, and are not run: "
            "run `finercut fetch` again, and the stages after it"
        )
    tokenizer = directory / "tokenizer_config.json"
    configs = [config, *([read_object(tokenizer)] if tokenizer.is_file() else [])]
    for reference in _strings([config.get("auto_map") for config in configs]):
        # `owner/name--file.Class` is downloaded, and `/folder/file.Class` read, whatever was looked at here.
        if not re.fullmatch(r"\w+\.\w+", reference):
            raise ValueError(
                f"auto_map in {directory} names {reference!r}, which is no `file.Class` beside config.json: code that "
                "lies elsewhere is not run; put it there, and its name into auto_map"
            )
    return True


def _strings(value: Any) -> Iterator[str]:
    """Every string value in a JSON value, at any depth; field names excluded."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def pruned_class(whole: PreTrainedModel, whole_directory: Path, directory: Path) -> type[PreTrainedModel]:
    """Write the code of the pruned model into `directory`.

    That is the whole model's files, `modeling_finercut.py`, and a module that combines them.

    Args:
        whole: loaded from `whole_directory` by trusted code.

    Returns:
        The pruned model's class, defined by that code.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from finercut.model import modeling_finercut

    directory.mkdir(parents=True, exist_ok=True)
    for file in (*python_files(whole_directory), Path(modeling_finercut.__file__)):
        shutil.copyfile(file, directory / file.name)
    (config_module, config), (model_module, model) = (
        whole.config.auto_map[name].split(".") for name in ("AutoConfig", "AutoModelForCausalLM")
    )
    prefix = modeling_finercut.PREFIX
    text = _PRUNED.format(
        prefix=prefix, config_module=config_module, config=config, model_module=model_module, model=model
    )
    (directory / PRUNED_FILE).write_text(text, encoding="utf-8")
    return get_class_from_dynamic_module(f"{Path(PRUNED_FILE).stem}.{prefix}{model}", directory)
