"""The command line: the commands put together, and errors as one line."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from addenda import __version__
from addenda.commands import backbones, bench, cache, changes, database, exchange, insight, serve, tasks
from addenda.commands.demo import demo
from addenda.commands.doctor import doctor
from addenda.commands.export_model import export_model
from addenda.commands.learn import evaluate, learn, learn_many
from addenda.commands.predict import predict
from addenda.commands.verify import verify
from addenda.exceptions import AddendaError

INTERRUPTED = 130  # typer's exit code after Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    help="Adds vision tasks to a frozen Vision Transformer; every earlier task keeps its outputs, bit for bit.",
)
for command in (learn, learn_many, evaluate, predict, verify, export_model, serve.serve, demo, doctor):
    app.command()(command)
for more in (
    insight.history,
    insight.compare,
    insight.lineage,
    changes.alias,
    changes.tag,
    changes.note,
    changes.retire,
):
    tasks.app.command()(more)
tasks.app.command()(exchange.export)
tasks.app.command("import")(exchange.import_)
database.app.command()(exchange.merge)
app.add_typer(tasks.app, name="tasks")
app.add_typer(backbones.app, name="backbones")
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")
app.add_typer(database.app, name="db")
app.add_typer(serve.app, name="keys")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Adds vision tasks to a frozen Vision Transformer; every earlier task keeps its outputs, bit for bit."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _worth_showing(record: logging.LogRecord) -> bool:
    """False for the traceback that a library logs because Ctrl-C came while it closed a connection."""
    return not (record.exc_info and isinstance(record.exc_info[1], KeyboardInterrupt))


def main() -> None:
    """Runs the command line; bad input is one line and exit code 2, never a traceback."""
    if logging.lastResort:
        logging.lastResort.addFilter(_worth_showing)
    try:
        app()
    except AddendaError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a place that may not be read or written, or whose name cannot be one
        typer.echo(f"Error: {str(error)[:500]}.", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("Interrupted. Nothing half done was registered: give the same command again to go on.", err=True)
        raise


if __name__ == "__main__":
    main()
