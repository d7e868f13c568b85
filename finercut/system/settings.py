"""What the sections of params.yaml have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["bfloat16", "float16", "float32"]
AnyDtype = Dtype | Literal["auto"]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Frozen; a misspelt key is an error, and so is `8` in quotes, `true` for 1, an empty text or infinity."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        str_min_length=1,
        use_attribute_docstrings=True,
    )
