"""The `tasks` commands: tasks listed, shown, named, retired, and compared over time, with others and among kin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.tree import Tree
from typer import Argument, Option

from addenda.commands import options
from addenda.terminal import SCORES, answer, console, minute, percent, plural, print_json, size, table

if TYPE_CHECKING:
    from addenda.registry import Kin, TaskRecord

HEADLINES = ("score", "val %", "test %", "probe %")

app = typer.Typer(no_args_is_help=True, help="The registered tasks.")


@app.command("list")
def tasks_list(
    name: Annotated[str | None, Argument(help="A name, or a pattern such as 'birds-*'. Default: all.")] = None,
    backbone: Annotated[str | None, Option(help="On this backbone: a timm name or a fingerprint.")] = None,
    tag: Annotated[str | None, Option(help="Only tasks that carry this tag.")] = None,
    extends: Annotated[str | None, Option(help="Only tasks that extend this one.")] = None,
    min_score: Annotated[
        float | None, Option(min=0, max=1, help="Only with such an accuracy (or mAP) on test images, 0 to 1.")
    ] = None,
    since: Annotated[str | None, Option(help="Registered since, in UTC: 2026-01-31 or 2026-01-31T12:00.")] = None,
    until: Annotated[str | None, Option(help="Registered before.")] = None,
    retired: Annotated[bool, Option("--retired", help="Show retired tasks too.")] = False,
    limit: Annotated[int, Option(min=1, help="The newest so many.")] = 100,
    before: Annotated[str | None, Option(help="Only tasks registered before this one: the next page.")] = None,
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Lists registered versions of tasks, the newest last."""
    from addenda.registry import TaskFilter

    with options.open_registry(registry) as opened:
        chosen = TaskFilter(name, backbone, tag, extends, min_score, since, until, retired)
        records, generation = opened.tasks(chosen, limit + 1, before), opened.generation
        names = {b["fingerprint"]: b["name"] for b in opened.backbones()}
    more, records = len(records) > limit, records[-limit:]
    if as_json:
        print_json([_record_json(record) for record in records])
        return
    kinds, _, tests, probes = zip(*map(headlines, records), strict=True) if records else [()] * 4
    columns = {
        "task": [r.ref + (" (retired)" if r.retired is not None else "") for r in records],
        "also": [_also(r) for r in records],
        "backbone": [names[r.backbone] for r in records] if len(names) > 1 else [],
        "classes": [len(r.labels) for r in records],
        "score": kinds if len(set(kinds)) > 1 else [],
        "val %": [headlines(r)[1] for r in records] if "–" in tests else [],
        "test %": tests,
        "probe %": probes,
        "learned": [r.created_at[:10] for r in records],
    }
    shown = {key: values for key, values in columns.items() if set(values) - {"", "–"}}
    title = f"{plural(len(records), 'task')} in {opened.location}, generation {generation}"
    right = ("classes", *HEADLINES[1:])
    rows = zip(*shown.values(), strict=True)
    console.print(table(title, list(shown), rows, right, whole=("task", "learned", *right)) if records else title)
    if more:
        console.print(f"Older ones: --before {records[0].ref}")


@app.command("show")
def tasks_show(
    name: options.Ref, registry: options.Registry = options.DEFAULT_REGISTRY, as_json: options.Json = False
) -> None:
    """Shows all that is recorded of one task."""
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
            score = percent(e.metrics[kind])
            digests = e.data_fingerprint[:12], e.logits_digest[:12]
            rows.append((minute(e.created_at), e.generation, e.metrics["num_images"], score, *digests))
        columns = ("when", "generation", "images", f"{SCORES[record.objective][kind]} %", "data", "logits")
        console.print(table("Evaluations", columns, rows, right=columns[1:4]))


def _also(record: TaskRecord) -> str:
    """Its aliases, tags and parents, in a few words."""
    parents = [f"extends {', '.join(record.extends)}"] if record.extends else []
    return " ".join([*(f"@{alias}" for alias in record.aliases), *(f"#{tag}" for tag in record.tags), *parents])


def show_task(record: TaskRecord) -> None:
    """A task for people: what it is, how good beside the probes of the frozen network, where it came from."""
    from addenda.registry import baselines

    labels = ", ".join(record.labels[:12]) + (", …" if len(record.labels) > 12 else "")
    weight = f"{record.num_parameters:,} parameters, {size(record.size_bytes)}"
    kept = f"{size(record.statistics_bytes)}, for choosing the task" if record.statistics_bytes else "none"
    when = record.created_at[:19].replace("T", " ")
    rows = [
        ("classes", f"{len(record.labels)}: {labels}"),
        ("objective", record.objective),
        ("reads", record.reads),
        ("weight", weight),
        ("extends", ", ".join(record.extends) or "nothing"),
        ("temperature", "damaged" if record.temperature is None else f"{record.temperature:.3g}"),
        ("statistics", kept),
        ("size", size(record.size_bytes + record.statistics_bytes)),
        ("learned from", f"{record.data.get('num_images', '?')} images"),
        ("tags", ", ".join(record.tags) or "none"),
        ("sha256", record.sha256),
        ("registered", f"{when} UTC by {record.created_by}, generation {record.generation}"),
    ]
    metrics = record.metrics
    if "candidates" in metrics:
        chosen, text = metrics["chosen"], "no token: beside the probe none pays by the validation images"
        if chosen is not None:
            used = {key: value for key, value in chosen.items() if record.adapter_rank or not key.startswith("adapter")}
            settings = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in used.items())
            text = f"{settings}; of {len(metrics['candidates'])} candidates"
            if "token_weight" in metrics:
                text += f"; the token weighs {metrics['token_weight']:g}, the probe the rest"
        rows.insert(-3, ("chosen", text))
    if record.retired is not None:
        rows.append(("retired", record.retired or "yes"))
    console.print(table(record.ref, ("", "value"), rows))
    shown = SCORES[record.objective]
    scores = [
        (f"{part} ({metrics[part].get('num_images', '?')})", who, *(percent(of[part].get(kind)) for kind in shown))
        for part in ("validation", "test")
        if part in metrics
        for who, of in {**baselines(metrics), "task": metrics}.items()
        if part in of
    ]
    if scores:
        columns = ("part", "of the", *shown.values())
        title = "Scores in %, beside probes of the frozen network on the same images"
        console.print(table(title, columns, scores, right=columns[2:]))


def headlines(record: TaskRecord, metrics: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The figures that stand for a task, as HEADLINES names them; of `metrics`, by default the record's."""
    from addenda.registry import baselines, headline

    kind, metrics = headline(record.objective), record.metrics if metrics is None else metrics
    probe = baselines(metrics).get("linear probe", {})
    parts = (metrics.get("validation", {}), metrics.get("test", {}), probe.get("test", {}))
    return SCORES[record.objective][kind], *(percent(part.get(kind)) for part in parts)


def _record_json(record: TaskRecord) -> dict[str, Any]:
    return {"ref": record.ref, **vars(record)}


@app.command()
def alias(
    name: Annotated[str, Argument(help="NAME or NAME:VERSION.")],
    alias: Annotated[str, Argument(help="The alias, such as production.")],
    expect: Annotated[int | None, Option(min=0, help="Only if it points at this version now; 0: if at none.")] = None,
    remove: Annotated[bool, Option("--remove", help="Let it point at nothing.")] = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Points NAME@ALIAS at a version; `addenda db log NAME` shows where it pointed before."""
    with options.open_registry(registry) as opened:
        record = opened.record(name)
        if remove:
            opened.remove_alias(record.name, alias, expected=expect)
        else:
            opened.set_alias(record.name, alias, record.version, expected=expect)
    typer.echo(f"{record.name}@{alias} is {'gone' if remove else record.ref}.")


@app.command()
def tag(
    name: options.Ref,
    tags: Annotated[list[str], Argument(help="Tags, such as team=vision.")],
    remove: Annotated[bool, Option("--remove", help="Take them off.")] = False,
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Puts tags on a version, to list tasks by."""
    with options.open_registry(registry) as opened:
        ref = opened.record(name).ref
        for one in tags:
            (opened.untag if remove else opened.tag)(ref, one)
        carried = opened.record(ref).tags
    typer.echo(f"{ref} carries {', '.join(carried) or 'no tag'}.")


@app.command()
def note(
    name: options.Ref,
    text: Annotated[str, Argument(help="What is to be known of it.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Adds a note to a version's history."""
    with options.open_registry(registry) as opened:
        ref = opened.record(name).ref
        opened.note(ref, text)
    typer.echo(f"Noted of {ref}. See: addenda db log {ref.partition(':')[0]}")


@app.command()
def retire(
    name: Annotated[str, Argument(help="NAME or NAME:VERSION.")],
    reason: Annotated[str, Option(help="Why, for the record.")] = "",
    along: Annotated[
        list[str] | None, Option("--with", help="A task that extends it, to retire too; may be given again.")
    ] = None,
    registry: options.Registry = options.DEFAULT_REGISTRY,
) -> None:
    """Hides a version; nothing is deleted."""
    with options.open_registry(registry) as opened:
        refs = [opened.record(one).ref for one in (*(along or ()), name)]
        opened.retire(refs[-1], reason, refs[:-1])
    typer.echo(f"Retired: {', '.join(refs)}. {'It stays' if len(refs) == 1 else 'They stay'} in the registry.")


@app.command()
def history(
    name: Annotated[str, Argument(help="The task's name; all its versions are shown.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Shows every scoring of a task over generations: equal to the last digit, or why not.

    Exits with 1 where a score has changed and nothing explains it.
    """
    from addenda.registry import headline

    rows = []
    with options.open_registry(registry) as opened:
        found = opened.history(name)
        for one in found:
            evaluation, objective = one.evaluation, opened.record(one.evaluation.task).objective
            value, kind = evaluation.metrics.get(headline(objective)), SCORES[objective][headline(objective)]
            score = "–" if value is None else f"{kind} {100 * value:.4f} %"
            said = one.verdict if one.verdict == "first" else f"{one.verdict}: {one.reason}"
            rows.append((evaluation.generation, evaluation.task, evaluation.data_fingerprint[:8], score, said))
    columns = ("generation", "task", "data", "score", "beside the one before")
    title = f"{plural(len(rows), 'scoring')} of {name}"
    shown = table(title, columns, rows, right=columns[:1], whole=columns[:3]) if rows else title
    answer(as_json, [asdict(one) for one in found], shown)
    if any(one.verdict == "unexplained" for one in found):
        typer.echo("A score has changed and nothing explains it. See: addenda verify --deep", err=True)
        raise typer.Exit(1)


@app.command()
def compare(
    one: options.Ref,
    other: Annotated[str, Argument(help="Another.")],
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Shows what differs between two versions: settings, data, scores by class, packages."""
    with options.open_registry(registry) as opened:
        refs = [opened.record(ref).ref for ref in (one, other)]
        found = opened.compare(*refs)
    title = f"{refs[0]} and {refs[1]} differ in {plural(len(found), 'thing')}"
    rows = [(d.section, d.key, _brief(d.one), _brief(d.other)) for d in found]
    shown = table(title, ("part", "what", *refs), rows, whole=("part",)) if rows else title
    answer(as_json, [difference._asdict() for difference in found], shown)


@app.command()
def lineage(
    name: options.Ref, registry: options.Registry = options.DEFAULT_REGISTRY, as_json: options.Json = False
) -> None:
    """Shows what a task extends, and what extends it, as trees."""
    with options.open_registry(registry) as opened:
        found = opened.lineage(name)
    answer(as_json, asdict(found), _tree(found.extends, "extends"), _tree(found.extended_by, "is extended by"))


def _tree(root: Kin, says: str) -> Tree:
    def grow(branch: Tree, kin: Kin) -> None:
        for one in kin.kin:
            said = [*(["retired"] if one.retired else []), *(["see above"] if one.shown else [])]
            grow(branch.add(one.ref + (f" ({', '.join(said)})" if said else "")), one)
        if kin.left_out:
            branch.add(f"… and {kin.left_out} more")

    tree = Tree(f"{root.ref}{' (retired)' if root.retired else ''} {says}{'' if root.kin else ' nothing'}")
    grow(tree, root)
    return tree


def _brief(value: Any) -> str:
    """A value in a cell: figures to four digits, long texts cut, of a list of records how many."""
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return f"{len(value)} (all: --json)"
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
