"""The command line: the commands put together, and errors as one line."""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper
from typing import Annotated

import typer
from typer import Option

from addenda import __version__
from addenda.commands import backbones, bench, cache, db, serve, tasks
from addenda.commands.learn import evaluate, learn, learn_many
from addenda.commands.predict import predict
from addenda.commands.verify import doctor, verify
from addenda.exceptions import AddendaError
from addenda.text import shown, shown_lines

INTERRUPTED = 130  # typer's exit code after Ctrl-C
TRACEBACK = "--traceback"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for command in (learn, learn_many, evaluate, predict, verify, db.export_model, serve.serve, bench.demo, doctor):
    app.command()(command)
groups = {"tasks": tasks, "backbones": backbones, "bench": bench, "cache": cache, "db": db, "keys": serve}
for name, group in groups.items():
    app.add_typer(group.app, name=name)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, Option("--version", help="Print the version.")] = False,
    traceback: Annotated[
        bool, Option(TRACEBACK, help="Show where an unexpected error came from. May stand anywhere.")
    ] = False,
) -> None:
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
    if isinstance(sys.stdout, TextIOWrapper) and (
        sys.stdout.errors == "strict" or sys.stdout.encoding.lower() != "utf-8"
    ):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name or a dash that the terminal has no letters for
    with_traceback = TRACEBACK in sys.argv[1:]
    arguments = [word for word in sys.argv[1:] if word != TRACEBACK]  # wherever it stands
    try:
        app(arguments)
    except Exception as error:
        if with_traceback and not isinstance(error, AddendaError):
            raise
        if isinstance(error, AddendaError):
            said = shown_lines(str(error))
        elif isinstance(error, OSError):  # a place that may not be read or written, or whose name cannot be one
            said = f"{shown(str(error)[:500])}."
        else:
            said = (
                f"{type(error).__name__}: {shown(str(error))[:500] or 'no message'}. This is unexpected: a fault of "
                f"Addenda's, or of a package that it uses. The same command with {TRACEBACK} shows where it came from."
            )
        typer.echo(f"Error: {said}", err=True)
        sys.exit(2 if isinstance(error, AddendaError | OSError) else 1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("Interrupted. Nothing half done was registered: give the same command again to go on.", err=True)
        raise


if __name__ == "__main__":
    main()
