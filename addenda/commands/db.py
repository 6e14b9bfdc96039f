"""The `db` commands for operators of a registry, and the commands that transfer tasks to registries and files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

import addenda
from addenda.commands import options, tasks
from addenda.exceptions import RegistryError
from addenda.terminal import minute, print_json, print_result, size, table
from addenda.text import plural

if TYPE_CHECKING:
    from addenda.registry import Received

RenameOption = Annotated[list[str] | None, Option(help="OLD=NEW: add task OLD under the name NEW; repeat for several.")]
DryRunOption = Annotated[
    bool, Option("--dry-run", help="Show what would be added and change nothing; --registry must exist already.")
]

app = typer.Typer(no_args_is_help=True, help="The registry as a database: event log, checks, backups.")


@app.command("log")
def db_log(
    name: Annotated[str | None, Argument(help="Show only the events of this task. Default: all events.")] = None,
    after: Annotated[int, Option(min=0, max=options.MAX_COUNT, help="Show only events after this generation.")] = 0,
    limit: Annotated[
        int, Option(min=1, max=options.MAX_COUNT, help="Number of events, at most; the newest are shown.")
    ] = 50,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Shows the event log: who changed what and when, newest last."""
    with options.open_registry(registry) as opened:
        events = opened.events(name, after, limit)
    rows = []
    for event in events:
        subject = event.subject if len(event.subject) < 64 else f"{event.subject[:12]}…"
        details = ", ".join(f"{key} {_brief(value)}" for key, value in event.details.items() if key != "sha256")
        rows.append((event.id, minute(event.created_at), event.created_by, event.kind, subject, details))
    title = f"{plural(len(rows), 'event')} of {opened.location}, times in UTC"
    columns = ("#", "when", "who", "event", "subject", "details")
    log = table(title, columns, rows, right=("#",), whole=("#", "when", "event"))
    print_result(as_json, [vars(event) for event in events], log)


@app.command("upgrade")
def db_upgrade(registry: options.Registry = options.DEFAULT_REGISTRY) -> None:
    """Migrates the schema to the current version, as opening the registry does.

    Stop programs of an older version first: what they would still write afterwards is damage.
    """
    with options.open_registry(registry) as opened:
        typer.echo(f"{opened.location}: schema {opened.schema_version}, generation {opened.generation}.")


@app.command("check")
def db_check(registry: options.Registry = options.DEFAULT_REGISTRY) -> None:
    """Compares tables, indexes and triggers with the expected schema; exits with 1 if any differs.

    `addenda verify --deep` checks the stored data.
    """
    with options.open_registry(registry) as opened:
        faults, leftovers = opened.schema_faults(), opened.remains()
        outcome = plural(len(faults), "fault") if faults else "no faults"
        typer.echo(f"{opened.location}: schema {opened.schema_version}, {outcome}.")
    for folder in leftovers:
        typer.echo(f"A killed backup left {folder}; the next backup into the same folder removes it.", err=True)
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(1)


@app.command("backup")
def db_backup(
    file: Annotated[Path, Argument(help="New SQLite file to write.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Copies a registry, SQLite or PostgreSQL, to a new SQLite file, even while it is written, and checks the copy."""
    with options.open_registry(registry) as opened:
        copy = opened.backup(file)
    typer.echo(f"{file}: {plural(copy.num_tasks, 'task')}, generation {copy.generation}, digest {copy.head}.")


@app.command("restore")
def db_restore(
    file: Annotated[Path, Argument(help="Backup made by `addenda db backup`.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Copies a backup into an empty registry, SQLite or PostgreSQL, and checks the copy."""
    from addenda.registry import restore

    copy = restore(file, registry)
    typer.echo(f"Restored {plural(copy.num_tasks, 'task')}, generation {copy.generation}, digest {copy.head}.")


def _brief(value: object) -> str:
    """An event detail as text; digests are cut."""
    text = "none" if value in (None, "") else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


@tasks.app.command()
def export(
    names: Annotated[
        list[str], Argument(help="Tasks: NAME, NAME:VERSION or NAME@ALIAS. The tasks that they extend are included.")
    ],
    out: Annotated[Path, Option("--out", "-o", help="New bundle to write, such as birds.addenda.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Exports tasks to a bundle, a single file that another registry can import."""
    with options.open_registry(registry) as opened:
        refs = opened.export(names, out)
    typer.echo(f"{out}: {', '.join(refs)}; {size(out.stat().st_size)}.")


@tasks.app.command("import")
def import_(
    bundle: Annotated[Path, Argument(help="Bundle written by `addenda tasks export`.")],
    rename: RenameOption = None,
    dry_run: DryRunOption = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Imports the tasks of a bundle in one transaction; creates the registry if it does not exist."""
    from addenda.registry.exchange.bundle import open_bundle

    if options.is_absent(registry):
        with open_bundle(bundle):  # one that cannot be read is refused before a registry is created
            pass
    with options.open_registry(registry, not dry_run) as opened:
        _print_received(opened.import_bundle(bundle, _renames(rename), dry_run), dry_run, as_json)


@app.command()
def merge(
    other: Annotated[str, Argument(help="Path or URL of the registry to copy tasks from; it is not changed.")],
    rename: RenameOption = None,
    dry_run: DryRunOption = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Copies all tasks of another registry into this one, with retirements and free aliases, in one transaction."""
    with addenda.Registry.open(other, read_only=True) as source, options.open_registry(registry, not dry_run) as opened:
        _print_received(opened.merge(source, _renames(rename), dry_run), dry_run, as_json)


def _renames(values: Sequence[str] | None) -> dict[str, str]:
    pairs = [value.partition("=") for value in values or ()]
    for old, equals, new in pairs:
        if not (old and equals and new):
            raise RegistryError(f"--rename must be OLD=NEW, not {old + equals + new!r}.")
    if repeated := sorted(old for old, count in Counter(old for old, *_ in pairs).items() if count > 1):
        raise RegistryError(f"--rename gives {repeated[0]!r} two new names; give it one.")
    return {old: new for old, _, new in pairs}


def _print_received(received: Sequence[Received], dry_run: bool, as_json: bool) -> None:
    num_added = sum(row.state == "added" and "@" not in row.ref for row in received)  # without aliases
    verb = "would be" if dry_run else "were" if num_added != 1 else "was"
    title = f"{plural(num_added, 'task')} {verb} added" + (", nothing was changed" if dry_run else "")
    rows = [(row.ref, row.origin if row.origin != row.ref else "", row.state, row.detail) for row in received]
    columns = ("task", "origin", "state", "detail")
    print_result(as_json, [vars(row) for row in received], table(title, columns, rows, whole=columns[:1]))


def export_model(
    out: Annotated[Path, Option("--out", "-o", help="New file to write: NAME.pt2, or NAME.onnx with --format onnx.")],
    tasks: Annotated[
        str | None,
        Option(help="NAME, NAME:VERSION or NAME@ALIAS, separated by commas. Default: the newest version of each task."),
    ] = None,
    format: Annotated[str, Option(help="Format: torch-export or onnx.")] = "torch-export",
    registry: options.Registry = options.DEFAULT_REGISTRY,
    backbone: options.RecordedBackbone = None,
    weights: options.Weights = None,
    as_json: options.Json = False,
) -> None:
    """Exports the combined model of some tasks to one file that runs without Addenda.

    The model maps preprocessed image tensors to each task's logits.

    The file is written only if its logits match the golden probes within a tolerance: equal bits require Addenda.
    """
    from addenda import exporting
    from addenda.combined import recorded_backbone

    with options.open_registry(registry) as opened:
        requested = [opened.get(ref.strip()) for ref in tasks.split(",")] if tasks is not None else []
        loaded = recorded_backbone(opened, weights, "cpu", backbone or (requested[0].backbone if requested else None))
        model = exporting.export_model(opened, loaded, requested or opened.load(loaded), out, format)
    if as_json:
        print_json(vars(model))
        return
    typer.echo(
        f"{model.path}: {', '.join(model.tasks)}; {model.format}, {size(model.size_bytes)}.\n"
        f"Its logits for the golden probes differ from the recorded ones by at most {model.deviation:.1e} of the "
        f"largest logit (tolerance {model.tolerance:g})."
    )
