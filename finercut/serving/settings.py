"""Section `throughput` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from finercut.system.settings import AnyDtype, Dtype, Section


class EngineSettings(Section):
    """How a vLLM engine is started."""

    concurrency: PositiveInt
    """Requests in flight."""
    dtype: Dtype
    max_model_len: PositiveInt
    """Tokens."""
    kv_cache_gib: PositiveFloat
    """KV cache given to every engine, on CPU and GPU alike."""
    enforce_eager: bool
    """Without torch.compile and CUDA graphs: starts faster, runs slower."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that each matrix is divided among."""
    pipeline_parallel_size: PositiveInt = 1
    """GPUs, or groups of `tensor_parallel_size` of them, that the blocks are divided among."""


class Load(Section):
    """Requests that are served together: all at once, or as they arrive."""

    input_tokens: PositiveInt
    """Of each request."""
    output_tokens: Annotated[int, Field(ge=2)]
    """Of each request."""
    concurrency: PositiveInt
    """Requests in flight; with a `request_rate`, at most, and others wait."""
    request_rate: PositiveFloat | None = None
    """Requests that arrive in a second, at random times (Poisson); the speed-up is then TPOT's, as tokens/s are given.
    null: all at once."""
    n_requests: PositiveInt | None = None
    """Of each round, with a `request_rate`; null: as many as `concurrency`."""

    @model_validator(mode="after")
    def _number_goes_with_a_rate(self) -> Load:
        if self.n_requests is not None and self.request_rate is None:
            raise ValueError("n_requests goes with request_rate: give both, or leave it null and set concurrency")
        return self


class Throughput(EngineSettings, Load):
    """The load that promotion and the gate go by, and how it is measured."""

    dtype: AnyDtype
    """As in search; the report says which it was."""
    more_loads: list[Load] = Field(default_factory=list)
    """Others that the same engines serve, to see what long prompts, long answers or many requests change."""
    n_warmups: PositiveInt
    """Untimed rounds, of each load."""
    n_rounds: Annotated[int, Field(ge=2)]
    """Timed rounds of each load, each with new random prompts."""
    interleave: bool
    """Both engines at once, a round each in turn, so that whatever else the machine does slows both alike; false for
    models that do not fit beside each other."""

    @model_validator(mode="after")
    def _requests_fit(self) -> Throughput:
        for load in self.loads:
            if load.input_tokens + load.output_tokens > self.max_model_len:
                raise ValueError(
                    f"input_tokens + output_tokens = {load.input_tokens + load.output_tokens} "
                    f"do not fit max_model_len = {self.max_model_len}"
                )
        return self

    @property
    def loads(self) -> list[Load]:
        """The one that decides comes first."""
        return [self, *self.more_loads]

    @property
    def engine(self) -> EngineSettings:
        """What an engine is started with that serves every load."""
        from finercut.model.devices import device_of, dtype_of

        dtype = str(dtype_of(self.dtype, device_of("auto"))).removeprefix("torch.")
        concurrency = max(load.concurrency for load in self.loads)
        settings = self.model_dump(include=set(EngineSettings.model_fields))
        return EngineSettings.model_validate(settings | {"dtype": dtype, "concurrency": concurrency})
