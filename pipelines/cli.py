"""The command `finercut`. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import click

from finercut.system.imports import large_imports
from finercut.system.machine import prepare
from finercut.system.redaction import install, redacted

from . import cli_registry, cli_stages, paths
from .cli_stages import STAGES

# How `finercut run` wants them, where the user has not said otherwise. Read when Prefect is imported.
PREFECT = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "finercut",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The server it starts when it has none can need longer than the default 20 s on a busy machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


# Of a context: whether nothing is asked for but help, which no machine refuses.
HELP = f"{__name__}.help"


class Commands(click.Group):
    """In the order they are used; what a user can put right is shown as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["run", *STAGES, *sorted(set(self.commands) - {"run", *STAGES})]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        ctx.meta[HELP] = any(name in own for name in ctx.help_option_names)
        return super().parse_args(ctx, args)

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        with _usage_in_one_line():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _usage_in_one_line():
                return super().invoke(ctx)
        except Exception as error:
            signals = (click.ClickException, click.exceptions.Exit, click.exceptions.Abort)
            if ctx.params.get("traceback") or isinstance(error, signals):
                raise
            if _began_with_interrupt(error):
                raise click.Abort from error
            click.echo(f"finercut {ctx.invoked_subcommand}: {_one_line(error, ctx.invoked_subcommand)}", err=True)
            sys.exit(1)


class _Usage(click.ClickException):
    """Options or arguments that are not there."""

    exit_code = 2

    def show(self, file: IO[str] | None = None) -> None:
        click.echo(self.message, err=True)


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = " ".join(["finercut", *(error.ctx.command_path.split()[1:] if error.ctx else ())])
        said = " ".join(error.format_message().split()).removesuffix(".")
        raise _Usage(f"{command}: {said}; see `{command} --help`") from error


def _began_with_interrupt(error: BaseException | None) -> bool:
    """Whether it was raised while an interrupt was dealt with: by Prefect, whose server was ended too, for one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


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
    finercut inspect artifacts/quantised            what was removed
    finercut inspect models:/NAME@challenger        what was registered

    All commands work in the current directory, the root of the project: settings come from params.yaml, results go to
    artifacts/ and reports/. `dvc repro` runs the same stages without Prefect, MLflow and registration.
    """
    install()
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed, as some supervisors do
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (to the end of the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a result is worth more than a letter the terminal does not have
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
    if not ctx.meta[HELP]:
        prepare()


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
    from finercut.system.processes import interrupt_on_end
    from finercut.system.staging import exclusive

    from . import params

    interrupt_on_end()
    params.load(file or paths.PARAMS)
    if not paths.PARAMS.is_file() and not Path("dvc.yaml").is_file():
        raise FileNotFoundError("neither params.yaml nor dvc.yaml is here; run from the project's root")
    # The flow holds the workspace too, but params.yaml is replaced before it, and Prefect takes seconds to start.
    with exclusive(paths.WORK):
        if file is not None:
            _take_params(file)
        _prepare_prefect()
        with large_imports():
            from . import summary
            from .flow import compress
            from .register import Refused

        local_store = not os.environ.get("MLFLOW_TRACKING_URI")
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
    type=click.Choice(["sublayers", "parameters", "kv_cache", "memory_gib", "speed_up", "tpot_ms"]),
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

    One measurement of the whole model serves all points, and one search unless it fills each budget (search.fill); each
    is pruned, healed, proved, evaluated and timed. Interrupted, it goes on where it was. params.yaml has the chosen
    budget afterwards. Ends with status 1 if a stage fails or no point passes.

    \b
    finercut frontier --budgets 0.1,0.15,0.2,0.25 --unit parameters
    finercut frontier --budgets 8,12,16 --unit sublayers --rule best

    \b
    Reads     params.yaml, dvc.yaml, and what the stages read
    Writes    as finercut run; reports/frontier.json and reports/frontier.png; a parent run in MLflow
    """
    from finercut.system.processes import interrupt_on_end
    from finercut.system.staging import exclusive

    from . import params, settings

    interrupt_on_end()
    amounts, given = _amounts(budgets), params.load()
    settings.check_budgets(amounts, unit or given.prune.budget.unit)
    with exclusive(paths.WORK):
        _prepare_prefect()
        with large_imports():
            from . import frontier as points
            from .flow import compress
            from .register import Refused

        local_store = not os.environ.get("MLFLOW_TRACKING_URI")
        try:
            compress(pull=pull, budgets=amounts, unit=unit, rule=rule)
        except Refused:
            click.echo(points.markdown())
            raise
        click.echo(points.markdown())
        click.echo(_where_to_look(local_store))


def _amounts(budgets: str) -> list[float]:
    try:
        amounts = [float(amount) for amount in budgets.split(",")]
    except ValueError:
        amounts = []
    if not amounts or not all(map(math.isfinite, amounts)):
        raise ValueError(f"--budgets takes numbers joined by commas, such as 0.1,0.2, got {budgets!r}")
    return amounts


def _prepare_prefect() -> None:
    from finercut.system.processes import withheld

    for name, value in PREFECT.items():
        os.environ.setdefault(name, value)
    _check_prefect()
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        # Starts Prefect's own server, which is to outlive a Ctrl-C: it records how the run ended.
        with withheld(signal.SIGINT, signal.SIGHUP), get_client(sync_client=True):
            pass


def _check_prefect() -> None:
    address = os.environ.get("PREFECT_API_URL")
    if address and not ("/api" in address and address.startswith(("http://", "https://"))):
        shape = "such as http://127.0.0.1:4200/api"
        click.echo(f"PREFECT_API_URL is {redacted(address)}; Prefect servers have addresses {shape}", err=True)
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
            "Page        reports/report.html",
            "Pictures    reports/removals.png, reports/search.png",
            "Figures     reports/*.json, or: dvc metrics show",
            "Checkpoint  artifacts/quantised, or: finercut inspect artifacts/quantised",
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
    """Describe a checkpoint, selection, trajectory or registered version.

    \b
    finercut inspect artifacts/quantised
    finercut inspect artifacts/selection.json
    finercut inspect artifacts/trajectory.jsonl
    finercut inspect models:/finercut-smollm2-135m@challenger
    """
    from . import inspection

    click.echo(inspection.describe(what))


@main.command("summary")
def show_summary() -> None:
    """Show again what `finercut run` printed at its end, from reports/."""
    from . import summary

    click.echo(summary.markdown())


@main.command()
@click.argument("what", metavar="[PATH_OR_URI]", required=False)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file.  [default: in reports/, named after WHAT]",
)
def report(what: str | None, output: Path | None) -> None:
    """Write one page that answers whether the model is worth it, from reports/, a registered version or a run.

    A single HTML file that needs no network: figures of whole, pruned and healed model, the gate's checks, what was
    removed and in which order, every task with its error, what the models write, the frontier that this is a point of,
    a map of what is redundant in the whole model, and what is needed to do it again. `finercut run` makes it as its
    last stage.

    \b
    finercut report
    finercut report models:/finercut-smollm2-135m@challenger --output challenger.html
    finercut report runs:/0123456789abcdef0123456789abcdef
    finercut report ../another-clone

    \b
    Reads     reports/, artifacts/trajectory.jsonl, params.yaml; or what the version or the run has of them
    Writes    reports/report.html; of others reports/NAME.html
    """
    from . import pages

    output = output or pages.default(what)
    pages.write(what, output)
    click.echo(f"{output} is written")


@main.command()
@click.argument("one", metavar="PATH_OR_URI")
@click.argument("other", metavar="PATH_OR_URI")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=paths.COMPARISON, show_default=True)
def compare(one: str, other: str, output: Path) -> None:
    """Compare two registered versions, runs or workspaces: figures, tasks, what was removed, settings.

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
    _check_prefect()
    from . import deployment

    click.echo(deployment.deploy(webhook))


@main.command("params")
def explain_params() -> None:
    """Explain every field of params.yaml, with its value there."""
    from . import params_help

    click.echo(params_help.text(paths.PARAMS))


for _command in (*cli_registry.COMMANDS, *cli_stages.commands()):
    main.add_command(_command)

if __name__ == "__main__":
    main(prog_name="finercut")
