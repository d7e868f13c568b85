"""The one typed reading of `params.yaml`: each room has its section, and they are put together here."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveFloat, ValidationError

from finercut.checkpoint.settings import Heal, Prove, Prune
from finercut.evaluation.settings import Evaluate
from finercut.registry.settings import Promote, Register, Retention
from finercut.selection.settings import Search
from finercut.serving.settings import Throughput
from finercut.sources.settings import Calibrate, Fetch
from finercut.system.redaction import redacted
from finercut.system.settings import Section

Stage = Literal["fetch", "calibrate", "search", "prune", "heal", "prove", "evaluate_whole", "evaluate", "throughput"]
# Errors beyond these are only counted.
N_ERRORS_SHOWN = 5


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
    heal: Heal
    prove: Prove
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
