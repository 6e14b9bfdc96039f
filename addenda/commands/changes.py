"""The `tasks` commands that change what is said of tasks, never the tasks: aliases, tags, notes, retirement."""

from __future__ import annotations

from typing import Annotated

import typer

from addenda.commands.options import DEFAULT_REGISTRY, RegistryOption

TaskArgument = Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")]


def alias(
    name: Annotated[str, typer.Argument(help="NAME or NAME:VERSION.")],
    alias: Annotated[str, typer.Argument(help="The alias, such as production.")],
    expect: Annotated[
        int | None, typer.Option(min=0, help="Only if it points at this version now; 0: if at none.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Let it point at nothing.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Points NAME@ALIAS at a version; `addenda db log NAME` shows where it pointed before."""
    from addenda import Registry

    with Registry.open(registry, create=False) as opened:
        record = opened.record(name)
        if remove:
            opened.remove_alias(record.name, alias, expected=expect)
        else:
            opened.set_alias(record.name, alias, record.version, expected=expect)
    typer.echo(f"{record.name}@{alias} is {'gone' if remove else record.ref}.")


def tag(
    name: TaskArgument,
    tags: Annotated[list[str], typer.Argument(help="Tags, such as team=vision.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take them off.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Puts tags on a version, to list tasks by."""
    from addenda import Registry

    with Registry.open(registry, create=False) as opened:
        ref = opened.record(name).ref
        for one in tags:
            (opened.untag if remove else opened.tag)(ref, one)
        carried = opened.record(ref).tags
    typer.echo(f"{ref} carries {', '.join(carried) or 'no tag'}.")


def note(
    name: TaskArgument,
    text: Annotated[str, typer.Argument(help="What is to be known of it.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Adds a note to a version's history."""
    from addenda import Registry

    with Registry.open(registry, create=False) as opened:
        ref = opened.record(name).ref
        opened.note(ref, text)
    typer.echo(f"Noted of {ref}. See: addenda db log {ref.partition(':')[0]}")


def retire(
    name: Annotated[str, typer.Argument(help="NAME or NAME:VERSION.")],
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    along: Annotated[
        list[str] | None, typer.Option("--with", help="A task that extends it, to retire too; may be given again.")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Hides a version; nothing is deleted."""
    from addenda import Registry

    with Registry.open(registry, create=False) as opened:
        refs = [opened.record(one).ref for one in (*(along or ()), name)]
        opened.retire(refs[-1], reason, refs[:-1])
    typer.echo(f"Retired: {', '.join(refs)}. {'It stays' if len(refs) == 1 else 'They stay'} in the registry.")
