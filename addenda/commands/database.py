"""The `db` commands: the registry as a database, for who runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from addenda.commands.options import DEFAULT_REGISTRY, JsonOption, RegistryOption

app = typer.Typer(no_args_is_help=True, help="The registry as a database: its log, checks, backups.")


@app.command("log")
def db_log(
    name: Annotated[str | None, typer.Argument(help="Only what happened to this task. Default: all.")] = None,
    after: Annotated[int, typer.Option(min=0, help="Only events past this generation.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Shows who did what and when, the newest last."""
    from addenda import Registry
    from addenda.terminal import console, print_json, table

    with Registry.open(registry, create=False) as opened:
        events = opened.events(name, after, limit)
    if as_json:
        print_json([vars(event) for event in events])
        return
    rows = [
        (
            event.id,
            event.created_at[:16].replace("T", " "),
            event.created_by,
            event.kind,
            event.subject if len(event.subject) < 64 else f"{event.subject[:12]}…",
            ", ".join(f"{key} {_brief(value)}" for key, value in event.details.items() if key != "sha256"),
        )
        for event in events
    ]
    title = f"{len(rows)} event{'' if len(rows) == 1 else 's'} of {opened.location}, times in UTC"
    console.print(
        table(title, ("#", "when", "who", "what", "of", "details"), rows, right=("#",), whole=("#", "when", "what"))
    )


@app.command("upgrade")
def db_upgrade(registry: RegistryOption = DEFAULT_REGISTRY) -> None:
    """Brings the schema up to date, as opening the registry does; other programs may go on."""
    from addenda import Registry

    with Registry.open(registry, create=False) as opened:
        typer.echo(f"{opened.location}: schema {opened.schema_version}, generation {opened.generation}.")


@app.command("check")
def db_check(registry: RegistryOption = DEFAULT_REGISTRY) -> None:
    """Compares tables, indexes and triggers with what they should be; exits with 1 where one is not.

    `addenda verify --deep` checks what is in them.
    """
    from addenda import Registry

    with Registry.open(registry, create=False) as opened:
        faults, remains = opened.schema_faults(), opened.remains()
        typer.echo(f"{opened.location}: schema {opened.schema_version}, {_count(faults)}.")
    for folder in remains:
        typer.echo(f"A backup that was killed left {folder}; the next backup beside it removes that.", err=True)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(1)


@app.command("backup")
def db_backup(
    file: Annotated[Path, typer.Argument(help="The SQLite file to make.")], registry: RegistryOption = DEFAULT_REGISTRY
) -> None:
    """Copies the whole registry, of either kind, to a new SQLite file, beside running writers, and checks the copy."""
    from addenda import Registry

    with Registry.open(registry, create=False) as opened:
        found = opened.backup(file)
    typer.echo(f"{file}: {found.num_tasks} tasks, generation {found.generation}, digest {found.head}.")


@app.command("restore")
def db_restore(
    file: Annotated[Path, typer.Argument(help="A backup.")], registry: RegistryOption = DEFAULT_REGISTRY
) -> None:
    """Copies a backup into an empty registry, on SQLite or PostgreSQL, and checks the copy."""
    from addenda.registry import restore

    found = restore(file, registry)
    typer.echo(f"Restored {found.num_tasks} tasks, generation {found.generation}, digest {found.head}.")


def _brief(value: object) -> str:
    """A detail of an event: of a digest its beginning."""
    text = "none" if value in (None, "") else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _count(faults: list[str]) -> str:
    return "as it should be" if not faults else f"{len(faults)} fault{'' if len(faults) == 1 else 's'}"
