"""What the stage `costs` reports. Imports nothing heavy: whoever reads reports reads this one too."""

from __future__ import annotations

from pydantic import Field

from finercut.system.records import Record, Spread


class Timed(Record):
    """A pruned model beside the whole one, in turn under the same load."""

    removed: list[str]
    time_ratio: Spread
    """Of the time per output token, pruned over whole, over the rounds."""
    tpot_ratio: Spread
    """The same of TPOT."""


class Group(Record):
    """Sublayers of one kind and shape."""

    sublayers: list[str]
    ms: float
    """Of each, per output token."""


class Fit(Record):
    """Milliseconds per output token by groups of sublayers."""

    base_ms: float
    """Of what no search removes: embeddings, head, scheduling, and sublayers that have to stay."""
    groups: list[Group]
    spread: float
    """Relative: half of the largest range of a ratio over the rounds."""
    residual: float
    """Relative: the largest difference of a fitted from a measured time."""

    @property
    def error(self) -> float:
        """Relative, of a predicted time."""
        return self.spread + self.residual


class CostsReport(Record):
    """Empty where `prune.budget` is in a unit that the config tells."""

    input_tokens: int | None = None
    """Of each request of the load, as are the next two."""
    output_tokens: int | None = None
    concurrency: int | None = None
    memory_tokens: int | None = None
    """Whose keys and values are in the cache when all requests have their last token."""
    time: Fit | None = None
    """Of the time per output token of the whole load, prefill included: the inverse of output tokens/s."""
    tpot: Fit | None = None
    """Of TPOT: decoding alone."""
    timed: list[Timed] = Field([])
    whole_sha256: str | None = None
    """Of the whole model that was timed."""
    engine: str | None = None
    torch_version: str | None = None
    hardware: str | None = None
    dtype: str | None = None
    n_rounds: int | None = None
