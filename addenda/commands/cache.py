"""The `cache` commands: list and clear the activation cache."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument

from addenda.commands import options
from addenda.exceptions import DataError
from addenda.terminal import print_result, size, table

app = typer.Typer(no_args_is_help=True, help="The activation cache, which later runs on the same images reuse.")


@app.command("list")
def cache_list(as_json: options.Json = False) -> None:
    """Lists the entries of the activation cache."""
    from addenda.learner import ActivationCache

    cache = ActivationCache()
    entries = cache.sets()
    rows = [
        (e.name, e.backbone, e.num_images, e.num_done, size(e.num_bytes), f"{e.used_at:%Y-%m-%d %H:%M}")
        for e in entries
    ]
    total = size(sum(entry.num_bytes for entry in entries))
    title = f"{len(entries)} cache entr{'y' if len(entries) == 1 else 'ies'} in {cache.folder}, {total}"
    columns = ("entry", "backbone", "views", "done", "size", "used")
    values = [vars(entry) | {"used_at": entry.used_at.isoformat()} for entry in entries]
    print_result(as_json, values, table(title, columns, rows, right=columns[2:5]))


@app.command("clear")
def cache_clear(
    names: Annotated[
        list[str] | None,
        Argument(help="Names of the entries to delete, as `cache list` prints them. Default: all entries."),
    ] = None,
) -> None:
    """Deletes cache entries and checkpoints of interrupted runs. Exits with 1 if a run is using some; those stay."""
    from addenda.learner import ActivationCache

    cache = ActivationCache()
    unknown = set(names or ()) - {entry.name for entry in cache.sets()}
    if unknown:
        raise DataError(f"There is no cache entry {min(unknown)!r}. See: addenda cache list")
    freed, in_use = cache.clear(names or None)
    typer.echo(f"Freed {size(freed)} in {cache.folder}.")
    if in_use:
        typer.echo(f"Not deleted, in use by a running process: {', '.join(in_use)}.", err=True)
        raise typer.Exit(1)
