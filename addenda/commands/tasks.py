"""The `tasks` commands: list, show, tag, retire and compare registered tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.tree import Tree
from typer import Argument, Option

from addenda.commands import options
from addenda.terminal import SCORES, console, minute, percent, print_json, print_result, size, table
from addenda.text import plural, shown

if TYPE_CHECKING:
    from addenda.registry import Kin, TaskRecord

HEADLINES = ("score", "val %", "test %", "probe %")

app = typer.Typer(no_args_is_help=True, help="The registered tasks.")


@app.command("list")
def tasks_list(
    name: Annotated[str | None, Argument(help="Task name, or a pattern such as 'birds-*'. Default: all tasks.")] = None,
    backbone: Annotated[
        str | None, Option(help="Only tasks on this backbone: a timm model name or a fingerprint.")
    ] = None,
    tag: Annotated[str | None, Option(help="Only tasks with this tag.")] = None,
    extends: Annotated[str | None, Option(help="Only tasks that extend this one.")] = None,
    min_score: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            help="Only tasks with at least this accuracy (multi-label: mAP), from 0 to 1; on validation images if "
            "there were no test images.",
        ),
    ] = None,
    since: Annotated[
        str | None, Option(help="Only tasks registered since this UTC time: 2026-01-31 or 2026-01-31T12:00.")
    ] = None,
    until: Annotated[str | None, Option(help="Only tasks registered before this UTC time.")] = None,
    retired: Annotated[bool, Option("--retired", help="Show retired versions too.")] = False,
    limit: Annotated[
        int, Option(min=1, max=options.MAX_COUNT, help="Number of versions, at most; the newest are shown.")
    ] = 100,
    before: Annotated[
        str | None, Option(help="Only versions registered before this one, NAME:VERSION: the next page.")
    ] = None,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Lists registered task versions, newest last."""
    from addenda.registry import TaskFilter

    with options.open_registry(registry) as opened:
        task_filter = TaskFilter(name, backbone, tag, extends, min_score, since, until, retired)
        records, generation = opened.tasks(task_filter, limit + 1, before), opened.generation
        names = {b["fingerprint"]: b["name"] for b in opened.backbones()}
    more, records = len(records) > limit, records[-limit:]
    if as_json:
        print_json([_record_json(record) for record in records])
        return
    kinds, _, tests, probes = zip(*map(headlines, records), strict=True) if records else [()] * 4
    columns = {
        "task": [r.ref + (" (retired)" if r.retired is not None else "") for r in records],
        "details": [_details(r) for r in records],
        "backbone": [names[r.backbone] for r in records] if len(names) > 1 else [],
        "classes": [len(r.labels) for r in records],
        "score": kinds if len(set(kinds)) > 1 else [],
        "val %": [headlines(r)[1] for r in records] if "–" in tests else [],
        "test %": tests,
        "probe %": probes,
        "learned": [r.created_at[:10] for r in records],
    }
    filled = {key: values for key, values in columns.items() if set(values) - {"", "–"}}
    title = f"{plural(len(records), 'task')} in {opened.location}, generation {generation}"
    right = ("classes", *HEADLINES[1:])
    rows = zip(*filled.values(), strict=True)
    whole = ("task", "learned", *right)
    console.print(table(title, list(filled), rows, right, whole) if records else shown(title))
    if more:
        console.print(f"Older tasks: --before {records[0].ref}")


@app.command("show")
def tasks_show(
    name: options.Ref, registry: options.Registry = options.DEFAULT_REGISTRY, as_json: options.Json = False
) -> None:
    """Shows a version's data, settings, scores and evaluations."""
    from addenda.registry import headline

    with options.open_registry(registry) as opened:
        record, evaluations = opened.record(name), opened.evaluations(name)
    if as_json:
        print_json(_record_json(record) | {"evaluations": [vars(e) for e in evaluations]})
        return
    show_task(record)
    if evaluations:
        kind = headline(record.objective)
        rows = []
        for e in evaluations:
            score, num_images = percent(e.metrics.get(kind)), e.metrics.get("num_images", "–")
            digests = e.data_fingerprint[:12], e.logits_digest[:12]
            rows.append((minute(e.created_at), e.generation, num_images, score, *digests))
        columns = ("when", "generation", "images", f"{SCORES[record.objective][kind]} %", "data", "logits")
        console.print(table("Evaluations", columns, rows, right=columns[1:4]))


def _details(record: TaskRecord) -> str:
    """Aliases, tags and parents of a task, in one cell."""
    parents = [f"extends {', '.join(record.extends)}"] if record.extends else []
    parents += [f"grown from {record.grown_from}"] if record.grown_from else []
    return " ".join([*(f"@{alias}" for alias in record.aliases), *(f"#{tag}" for tag in record.tags), *parents])


def show_task(record: TaskRecord, metrics: Mapping[str, Any] | None = None) -> None:
    """Prints a task: its properties, its provenance, and its scores beside those of the probes on frozen features.

    The scores are those of `metrics`, by default those that it was registered with.
    """
    from addenda.registry import baselines

    labels = ", ".join(record.labels[:12]) + (", …" if len(record.labels) > 12 else "")
    parameters = f"{record.num_parameters:,}, {size(record.size_bytes)}"
    statistics = size(record.statistics_bytes) if record.statistics_bytes else "none"
    when = record.created_at[:19].replace("T", " ")
    rows = [
        ("classes", f"{len(record.labels)}: {labels}"),
        ("objective", record.objective),
        ("head reads", record.reads),
        ("parameters", parameters),
        ("extends", ", ".join(record.extends) or "nothing"),
        *([("grown from", record.grown_from)] if record.grown_from else []),
        ("temperature", "damaged" if record.temperature is None else f"{record.temperature:.3g}"),
        ("routing statistics", statistics),
        ("total size", size(record.size_bytes + record.statistics_bytes)),
        ("learned from", f"{record.data.get('num_images', '?')} images"),
        ("tags", ", ".join(record.tags) or "none"),
        ("sha256", record.sha256),
        ("registered", f"{when} UTC by {record.created_by}, generation {record.generation}"),
    ]
    metrics = record.metrics if metrics is None else metrics
    if "candidates" in metrics:
        chosen, text = metrics["chosen"], "no token: none improves on the probe on the validation split"
        if chosen is not None:
            used = {key: value for key, value in chosen.items() if record.adapter_rank or not key.startswith("adapter")}
            settings = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in used.items())
            text = f"{settings}; of {len(metrics['candidates'])} candidates"
            if "token_weight" in metrics:
                text += f"; token weight {metrics['token_weight']:g}, probe weight {1 - metrics['token_weight']:g}"
        rows.insert(-3, ("chosen", text))
    if record.retired is not None:
        rows.append(("retired", record.retired or "yes"))
    console.print(table(record.ref, ("", "value"), rows))
    kinds = SCORES[record.objective]
    scores = [
        (f"{split} ({metrics[split].get('num_images', '?')})", model, *(percent(of[split].get(kind)) for kind in kinds))
        for split in ("validation", "test")
        if split in metrics
        for model, of in {**baselines(metrics), "task": metrics}.items()
        if split in of
    ]
    if scores:
        columns = ("split", "model", *kinds.values())
        title = "Scores in %, with the probes on frozen features of the same images"
        console.print(table(title, columns, scores, right=columns[2:]))


def headlines(record: TaskRecord, metrics: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The headline figures of a task, one for each of HEADLINES, from `metrics` or by default from the record."""
    from addenda.registry import baselines, headline

    kind, metrics = headline(record.objective), record.metrics if metrics is None else metrics
    probe = baselines(metrics).get("linear probe", {})
    splits = (metrics.get("validation", {}), metrics.get("test", {}), probe.get("test", {}))
    return SCORES[record.objective][kind], *(percent(split.get(kind)) for split in splits)


def _record_json(record: TaskRecord) -> dict[str, Any]:
    return {"ref": record.ref, "grown_from": record.grown_from, **vars(record)}


@app.command()
def alias(
    name: Annotated[str, Argument(help="Task: NAME (its newest version) or NAME:VERSION.")],
    alias: Annotated[str, Argument(help="Alias, such as production.")],
    expect: Annotated[
        int | None,
        Option(min=0, help="Fail unless the alias now points at this version number; 0: unless it does not exist."),
    ] = None,
    remove: Annotated[bool, Option("--remove", help="Remove the alias.")] = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Points NAME@ALIAS at a version; `addenda db log NAME` shows its earlier targets."""
    with options.open_registry(registry) as opened:
        record = opened.record(name)
        if remove:
            opened.remove_alias(record.name, alias, expected=expect)
        else:
            opened.set_alias(record.name, alias, record.version, expected=expect)
    ref = f"{record.name}@{alias}"
    typer.echo(f"Removed {ref}." if remove else f"{ref} points at {record.ref}.")


@app.command()
def tag(
    name: options.Ref,
    tags: Annotated[list[str], Argument(help="Tags, such as team=vision.")],
    remove: Annotated[bool, Option("--remove", help="Remove these tags.")] = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Adds tags to a version; `addenda tasks list` can filter by them."""
    from addenda.registry import check_tag

    with options.open_registry(registry) as opened:
        record = opened.record(name)
        for tag in tags:
            check_tag(tag)
        for tag in sorted(tags, key=record.tags.__contains__):  # one that is not there fails before any is removed
            (opened.untag if remove else opened.tag)(record.ref, tag)
        current = opened.record(record.ref).tags
    typer.echo(f"Tags of {record.ref}: {', '.join(current) or 'none'}.")


@app.command()
def note(
    name: options.Ref,
    text: Annotated[str, Argument(help="Text of the note.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Adds a note to the event log of a version."""
    with options.open_registry(registry) as opened:
        ref = opened.record(name).ref
        opened.note(ref, text)
    typer.echo(f"Added a note to {ref}. See: addenda db log {ref.partition(':')[0]}")


@app.command()
def retire(
    name: Annotated[str, Argument(help="Task: NAME (its newest version) or NAME:VERSION.")],
    reason: Annotated[str, Option(help="Reason, recorded in the registry. Default: none.")] = "",
    children: Annotated[
        list[str] | None, Option("--with", help="Task that extends it, to be retired too; repeat for several.")
    ] = None,
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Retires a version: it is hidden, and nothing is deleted."""
    with options.open_registry(registry) as opened:
        refs = [opened.record(ref).ref for ref in (*(children or ()), name)]
        opened.retire(refs[-1], reason, refs[:-1])
    typer.echo(f"Retired: {', '.join(refs)}. {'It stays' if len(refs) == 1 else 'They stay'} in the registry.")


@app.command()
def history(
    name: Annotated[str, Argument(help="Task name; all its versions are shown.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Shows every evaluation of a task over generations: whether its score stayed equal to the last digit, or why not.

    Exits with 1 if a score changed without explanation.
    """
    from addenda.registry import TaskFilter, headline

    rows = []
    with options.open_registry(registry) as opened:
        entries = opened.history(name)
        versions = opened.tasks(TaskFilter(name=name, retired=True))
        for entry in entries:
            evaluation, objective = entry.evaluation, opened.record(entry.evaluation.task).objective
            value, kind = evaluation.metrics.get(headline(objective)), SCORES[objective][headline(objective)]
            score = "–" if value is None else f"{kind} {100 * value:.4f} %"
            change = entry.verdict if entry.verdict == "first" else f"{entry.verdict}: {entry.reason}"
            rows.append((evaluation.generation, evaluation.task, evaluation.data_fingerprint[:8], score, change))
    columns = ("generation", "task", "data", "score", "change since the last evaluation")
    title = f"{plural(len(rows), 'evaluation')} of {name}"
    view = table(title, columns, rows, right=columns[:1], whole=columns[:3]) if rows else title
    grown = [f"{record.ref} was grown from {record.grown_from}." for record in versions if record.grown_from]
    print_result(as_json, [asdict(entry) for entry in entries], view, *grown)
    if any(entry.verdict == "unexplained" for entry in entries):
        typer.echo("A score changed without explanation. See: addenda verify --deep", err=True)
        raise typer.Exit(1)


@app.command()
def compare(
    first: options.Ref,
    second: Annotated[str, Argument(help="Task to compare with: NAME, NAME:VERSION or NAME@ALIAS.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Shows the differences between two versions: settings, data, scores per class, packages."""
    with options.open_registry(registry) as opened:
        refs = [opened.record(ref).ref for ref in (first, second)]
        differences = opened.compare(*refs)
    title = f"{refs[0]} and {refs[1]} differ in {plural(len(differences), 'value')}"
    rows = [(d.section, d.key, _brief(d.one), _brief(d.other)) for d in differences]
    view = table(title, ("section", "key", *refs), rows, whole=("section",)) if rows else title
    print_result(as_json, [difference._asdict() for difference in differences], view)


@app.command()
def lineage(
    name: options.Ref, registry: options.Registry = options.DEFAULT_REGISTRY, as_json: options.Json = False
) -> None:
    """Shows the tasks that a task extends, and those that extend it, as trees."""
    with options.open_registry(registry) as opened:
        lineage = opened.lineage(name)
    trees = _tree(lineage.extends, "extends"), _tree(lineage.extended_by, "is extended by")
    print_result(as_json, asdict(lineage), *trees)


def _tree(root: Kin, relation: str) -> Tree:
    def grow(branch: Tree, parent: Kin) -> None:
        for task in parent.kin:
            notes = [*(["retired"] if task.retired else []), *(["see above"] if task.repeated else [])]
            grow(branch.add(task.ref + (f" ({', '.join(notes)})" if notes else "")), task)
        if parent.left_out:
            branch.add(f"… and {parent.left_out} more")

    tree = Tree(f"{root.ref}{' (retired)' if root.retired else ''} {relation}{'' if root.kin else ' nothing'}")
    grow(tree, root)
    return tree


def _brief(value: Any) -> str:
    """A value as cell text: floats to four digits, long texts cut, and a list of records as its length."""
    if isinstance(value, list) and any(isinstance(record, dict) for record in value):
        return f"{len(value)} (all: --json)"
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
