"""The commands of `finercut` about registered versions: promotion, its undoing, and what follows or cleans up."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import paths


@click.command()
@click.argument("name", required=False)
@click.option("--version", "wanted", default="challenger", show_default=True, help="A version's number, or an alias.")
@click.option("--reason", default="", help="Why; kept in the log.")
@click.option("--dry-run", is_flag=True, help="Compare only. Status 1 if it would be refused.")
def promote(name: str | None, wanted: str, reason: str, dry_run: bool) -> None:
    """Make a registered version champion, if it passes the gate and is no worse than the champion.

    NAME is register.name of params.yaml unless given. Evidence comes from the registry; the checkpoint is downloaded,
    and where nothing but pruning changed its weights the parity check is repeated on it. docs/registry.md has the rule.
    Status 0: it is champion now, or was already.

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


@click.command()
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


@click.command()
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


@click.command()
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


@click.command()
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
    collected = collect.run(settings, name, dry_run)
    click.echo(collect.text(collected, dry_run))
    if collected.problems:
        sys.exit(1)


def _registered_name() -> str:
    from . import params

    return params.load(paths.PARAMS).register_.name


COMMANDS = (promote, rollback, status, watch, collect)
