"""The `cache` commands: the kept activations, listed and deleted."""

from __future__ import annotations

from typing import Annotated

import typer

from addenda.commands.options import JsonOption
from addenda.exceptions import DataError

app = typer.Typer(no_args_is_help=True, help="Activations kept for later runs on the same images.")


@app.command("list")
def cache_list(as_json: JsonOption = False) -> None:
    """Lists the activations that are kept for later runs on the same images."""
    from addenda.learner import ActivationCache
    from addenda.terminal import console, print_json, size, table

    cache = ActivationCache()
    kept = cache.sets()
    if as_json:
        print_json([vars(one) | {"used_at": one.used_at.isoformat()} for one in kept])
        return
    rows = [
        (k.name, k.backbone, k.num_images, k.num_done, size(k.num_bytes), f"{k.used_at:%Y-%m-%d %H:%M}") for k in kept
    ]
    total = size(sum(one.num_bytes for one in kept))
    title = f"{len(kept)} set{'' if len(kept) == 1 else 's'} of activations in {cache.folder}, {total}"
    console.print(
        table(title, ("set", "backbone", "images", "done", "size", "used"), rows, right=("images", "done", "size"))
    )


@app.command("clear")
def cache_clear(
    names: Annotated[list[str] | None, typer.Argument(help="Sets, as `cache list` names them. Default: all.")] = None,
) -> None:
    """Deletes kept activations; they are computed anew when they are needed."""
    from addenda.learner import ActivationCache
    from addenda.terminal import size

    cache = ActivationCache()
    unknown = set(names or ()) - {kept.name for kept in cache.sets()}
    if unknown:
        raise DataError(f"No set of activations is named {min(unknown)!r}. See: addenda cache list")
    freed, in_use = cache.clear(names or None)
    typer.echo(f"Freed {size(freed)} in {cache.folder}.")
    if in_use:
        typer.echo(f"In use by a run that is going on, and kept: {', '.join(in_use)}.", err=True)
        raise typer.Exit(1)
