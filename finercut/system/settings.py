"""The base of all sections of params.yaml, and types that several use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["bfloat16", "float16", "float32"]
AnyDtype = Dtype | Literal["auto"]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Frozen and strict: unknown keys, numbers in quotes, `true` for 1, empty text and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        str_min_length=1,
        use_attribute_docstrings=True,
    )
