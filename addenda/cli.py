"""The `addenda` command line: all commands, and errors printed as one line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback as tracebacks
import warnings
from io import TextIOWrapper
from types import FrameType
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

INTERRUPTED = 130  # exit code of typer after Ctrl-C
INTERRUPTED_NOTE = "Interrupted. No incomplete task was registered; run the same command again to continue."
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
        bool, Option(TRACEBACK, help="Print the traceback of an unexpected error. Accepted at any position.")
    ] = False,
) -> None:
    """Adds vision tasks to a frozen Vision Transformer; every earlier task keeps its logits, bit for bit."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _is_not_interrupt(record: logging.LogRecord) -> bool:
    """False for the traceback that a library logs when Ctrl-C interrupts it while it closes a connection."""
    return not (record.exc_info and isinstance(record.exc_info[1], KeyboardInterrupt))


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ends the process at once while a package is imported: one that is half imported may call itself without end."""
    if any(each.f_code.co_filename.startswith("<frozen importlib") for each, _ in tracebacks.walk_stack(frame)):
        os.write(2, f"{INTERRUPTED_NOTE}\n".encode())
        os._exit(INTERRUPTED)
    signal.default_int_handler(number, frame)


def main() -> None:
    """Runs the command line. Bad input prints one line and exits with 2, without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in a background job, which ignores it
        signal.signal(signal.SIGINT, _interrupt)
    if logging.lastResort:
        logging.lastResort.addFilter(_is_not_interrupt)
    if isinstance(sys.stdout, TextIOWrapper) and (
        sys.stdout.errors == "strict" or sys.stdout.encoding.lower() != "utf-8"
    ):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names and dashes outside the encoding
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # Pillow's, at half of the maximum
    with_traceback = TRACEBACK in sys.argv[1:]
    arguments = [word for word in sys.argv[1:] if word != TRACEBACK]
    try:
        app(arguments)
    except Exception as error:
        if with_traceback and not isinstance(error, AddendaError):
            raise
        if isinstance(error, AddendaError):
            message = shown_lines(str(error))
        elif isinstance(error, OSError):  # an unreadable or unwritable path, or an invalid file name
            message = f"{shown(str(error)[:500])}."
        else:
            message = (
                f"{type(error).__name__}: {shown(str(error))[:500] or 'no message'}. This is a bug in Addenda or in a "
                f"package that it uses. Run the same command with {TRACEBACK} to see where the error was raised."
            )
        typer.echo(f"Error: {message}", err=True)
        sys.exit(2 if isinstance(error, AddendaError | OSError) else 1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo(INTERRUPTED_NOTE, err=True)
        raise


if __name__ == "__main__":
    main()
