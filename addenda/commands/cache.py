"""The `cache` commands: the activation cache, listed and cleared."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument

from addenda.commands import options
from addenda.exceptions import DataError
from addenda.terminal import answer, size, table

app = typer.Typer(no_args_is_help=True, help="The activation cache, used again by later runs on the same images.")


@app.command("list")
def cache_list(as_json: options.Json = False) -> None:
    """Lists the entries of the activation cache, which later runs on the same images use again."""
    from addenda.learner import ActivationCache

    cache = ActivationCache()
    kept = cache.sets()
    rows = [
        (k.name, k.backbone, k.num_images, k.num_done, size(k.num_bytes), f"{k.used_at:%Y-%m-%d %H:%M}") for k in kept
    ]
    total = size(sum(one.num_bytes for one in kept))
    title = f"{len(kept)} cache entr{'y' if len(kept) == 1 else 'ies'} in {cache.folder}, {total}"
    columns = ("entry", "backbone", "images", "done", "size", "used")
    shown = table(title, columns, rows, right=columns[2:5])
    answer(as_json, [vars(one) | {"used_at": one.used_at.isoformat()} for one in kept], shown)


@app.command("clear")
def cache_clear(
    names: Annotated[list[str] | None, Argument(help="Entries, as `cache list` names them. Default: all.")] = None,
) -> None:
    """Deletes cache entries and checkpoints of interrupted runs; exits with 1 where a run has some open, which stay."""
    from addenda.learner import ActivationCache

    cache = ActivationCache()
    unknown = set(names or ()) - {kept.name for kept in cache.sets()}
    if unknown:
        raise DataError(f"No cache entry is named {min(unknown)!r}. See: addenda cache list")
    freed, in_use = cache.clear(names or None)
    typer.echo(f"Freed {size(freed)} in {cache.folder}.")
    if in_use:
        typer.echo(f"In use by a run that is going on, and kept: {', '.join(in_use)}.", err=True)
        raise typer.Exit(1)
