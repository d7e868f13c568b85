"""Sections `register`, `promote` and `collect` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from finercut.system.settings import Section


class Register(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=200)]
    """Of the registered model in MLflow: at most 200 letters, digits, - and _."""
    min_retention: PositiveFloat
    """Mean over tasks of pruned over whole accuracy."""
    min_speed_up: PositiveFloat
    """Pruned over whole output tokens/s in vLLM."""
    max_perplexity_ratio: PositiveFloat
    """Pruned over whole perplexity on the held-out tokens."""
    allow_doubtful_whole: bool = False
    """Whether to register although the whole model scores no better than guessing, or predicts plain text absurdly."""

    @property
    def limits(self) -> dict[str, float | bool]:
        """As `gate.check` takes them."""
        return self.model_dump(exclude={"name"})


class Promote(Section):
    """How much worse than the champion a challenger may be and still take its place."""

    max_retention_drop: Annotated[float, Field(ge=0, lt=1)]
    """Of the mean retention over the tasks both were evaluated on, in absolute terms."""
    max_perplexity_rise: Annotated[float, Field(ge=0)]
    """Of the perplexity ratio, as a share of the champion's. Compared on the same held-out tokens only."""
    max_speed_up_drop: Annotated[float, Field(ge=0, lt=1)]
    """Of the speed-up, as a share of the champion's. Compared under the same load, hardware and versions only."""
    allow_limited: bool
    """Accept challengers that were evaluated with a task `limit`."""


class Collect(Section):
    """What `finercut collect` keeps, in addition to every version that has an alias."""

    versions: PositiveInt
    """Newest registered versions whose checkpoints are kept; as many interrupted searches are kept."""
    commits: PositiveInt
    """Git commits, from HEAD back, whose results are kept in DVC's cache; those of the workspace always are."""
    unfinished_days: Annotated[float, Field(gt=0, le=36500)]
    """Uploads and downloads that did not end are kept this long, as they may be in progress."""
