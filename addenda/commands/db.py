"""The `db` commands, for who runs a registry; and tasks between registries, or out of one as a model in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

import addenda
from addenda.commands import options, tasks
from addenda.exceptions import RegistryError
from addenda.terminal import answer, minute, plural, print_json, size, table

if TYPE_CHECKING:
    from addenda.registry import Received

RenameOption = Annotated[list[str] | None, Option(help="OLD=NEW: call a task otherwise here; may be given again.")]
DryRunOption = Annotated[bool, Option("--dry-run", help="Only say what would be done; the registry must be there.")]

app = typer.Typer(no_args_is_help=True, help="The registry as a database: its log, checks, backups.")


@app.command("log")
def db_log(
    name: Annotated[str | None, Argument(help="Only what happened to this task. Default: all.")] = None,
    after: Annotated[int, Option(min=0, help="Only events past this generation.")] = 0,
    limit: Annotated[int, Option(min=1, help="The newest so many.")] = 50,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Shows who did what and when, the newest last."""
    with options.open_registry(registry) as opened:
        events = opened.events(name, after, limit)
    rows = []
    for event in events:
        subject = event.subject if len(event.subject) < 64 else f"{event.subject[:12]}…"
        details = ", ".join(f"{key} {_brief(value)}" for key, value in event.details.items() if key != "sha256")
        rows.append((event.id, minute(event.created_at), event.created_by, event.kind, subject, details))
    title = f"{plural(len(rows), 'event')} of {opened.location}, times in UTC"
    columns = ("#", "when", "who", "what", "of", "details")
    shown = table(title, columns, rows, right=("#",), whole=("#", "when", "what"))
    answer(as_json, [vars(event) for event in events], shown)


@app.command("upgrade")
def db_upgrade(registry: options.Registry = options.DEFAULT_REGISTRY) -> None:
    """Brings the schema up to date, as opening the registry does; other programs may go on."""
    with options.open_registry(registry) as opened:
        typer.echo(f"{opened.location}: schema {opened.schema_version}, generation {opened.generation}.")


@app.command("check")
def db_check(registry: options.Registry = options.DEFAULT_REGISTRY) -> None:
    """Compares tables, indexes and triggers with what they should be; exits with 1 where one is not.

    `addenda verify --deep` checks what is in them.
    """
    with options.open_registry(registry) as opened:
        faults, remains = opened.schema_faults(), opened.remains()
        found = plural(len(faults), "fault") if faults else "as it should be"
        typer.echo(f"{opened.location}: schema {opened.schema_version}, {found}.")
    for folder in remains:
        typer.echo(f"A backup that was killed left {folder}; the next backup beside it removes that.", err=True)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(1)


@app.command("backup")
def db_backup(
    file: Annotated[Path, Argument(help="The SQLite file to make.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Copies the whole registry, of either kind, to a new SQLite file, beside running writers, and checks the copy."""
    with options.open_registry(registry) as opened:
        found = opened.backup(file)
    typer.echo(f"{file}: {found.num_tasks} tasks, generation {found.generation}, digest {found.head}.")


@app.command("restore")
def db_restore(
    file: Annotated[Path, Argument(help="A backup.")], registry: options.Registry = options.DEFAULT_REGISTRY
) -> None:
    """Copies a backup into an empty registry, on SQLite or PostgreSQL, and checks the copy."""
    from addenda.registry import restore

    found = restore(file, registry)
    typer.echo(f"Restored {found.num_tasks} tasks, generation {found.generation}, digest {found.head}.")


def _brief(value: object) -> str:
    """A detail of an event: of a digest its beginning."""
    text = "none" if value in (None, "") else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


@tasks.app.command()
def export(
    names: Annotated[list[str], Argument(help="NAME, NAME:VERSION or NAME@ALIAS; what they extend comes along.")],
    out: Annotated[Path, Option("--out", "-o", help="The bundle to write, such as birds.addenda.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Writes tasks to a bundle, one file that another registry can import."""
    with options.open_registry(registry) as opened:
        refs = opened.export(names, out)
    typer.echo(f"{out}: {', '.join(refs)}; {size(out.stat().st_size)}.")


@tasks.app.command("import")
def import_(
    bundle: Annotated[Path, Argument(help="A file that `addenda tasks export` wrote.")],
    rename: RenameOption = None,
    dry_run: DryRunOption = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Takes in a bundle's tasks, all of them or none; makes the registry where there is none."""
    with options.open_registry(registry, not dry_run) as opened:
        _show(opened.import_bundle(bundle, _renames(rename), dry_run), dry_run, as_json)


@app.command()
def merge(
    other: Annotated[str, Argument(help="Path or URL of the registry to take tasks from; it stays as it is.")],
    rename: RenameOption = None,
    dry_run: DryRunOption = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Takes in every task of another registry, with retirements and free aliases, all of them or none."""
    with addenda.Registry.open(other, read_only=True) as source, options.open_registry(registry, not dry_run) as opened:
        _show(opened.merge(source, _renames(rename), dry_run), dry_run, as_json)


def _renames(given: Sequence[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in given or ()]
    for old, equals, new in pairs:
        if not (old and equals and new):
            raise RegistryError(f"--rename takes OLD=NEW, not {old + equals + new!r}.")
    return {old: new for old, _, new in pairs}


def _show(received: Sequence[Received], dry_run: bool, as_json: bool) -> None:
    added = sum(one.state == "added" and "@" not in one.ref for one in received)  # aliases are told in their rows
    would = "would be" if dry_run else "were" if added != 1 else "was"
    title = f"{plural(added, 'task')} {would} added" + (", nothing was changed" if dry_run else "")
    rows = [(one.ref, one.origin if one.origin != one.ref else "", one.state, one.detail) for one in received]
    shown = table(title, ("here", "there", "", "detail"), rows, whole=("here",))
    answer(as_json, [vars(one) for one in received], shown)


def export_model(
    out: Annotated[Path, Option("--out", "-o", help="The file to write: NAME.pt2, or NAME.onnx for onnx.")],
    tasks: Annotated[
        str | None, Option(help="NAME, NAME:VERSION or NAME@ALIAS, several with commas. Default: all active ones.")
    ] = None,
    format: Annotated[str, Option(help="torch-export or onnx.")] = "torch-export",
    registry: options.Registry = options.DEFAULT_REGISTRY,
    weights: options.Weights = None,
    as_json: options.Json = False,
) -> None:
    """Writes the combined model of some tasks to one file that runs without Addenda: images in, each task's logits out.

    Before the file is put in place, its answers to the golden probes are compared with the recorded ones. They agree
    within a tolerance; equal bits are promised by Addenda's own pass alone.
    """
    from addenda import exporting
    from addenda.combined import recorded_backbone

    with options.open_registry(registry) as opened:
        chosen = [opened.get(ref.strip()) for ref in tasks.split(",")] if tasks is not None else []
        backbone = recorded_backbone(opened, weights, "cpu", chosen[0].backbone if chosen else None)
        made = exporting.export_model(opened, backbone, chosen or opened.load(backbone), out, format)
    if as_json:
        print_json(vars(made))
        return
    typer.echo(
        f"{made.path}: {', '.join(made.tasks)}; {made.format}, {size(made.size_bytes)}.\n"
        f"Its answers to the golden probes deviate by {made.deviation:.1e} of the largest logit at most; "
        f"{made.tolerance:g} is allowed."
    )
