"""The `tasks` commands that compare: a task over time, beside another version, among its kin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from addenda.commands.options import DEFAULT_REGISTRY, JsonOption, RegistryOption

if TYPE_CHECKING:
    from rich.tree import Tree

    from addenda.registry import Kin


def history(
    name: Annotated[str, typer.Argument(help="The task's name; all its versions are shown.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Shows every scoring of a task over generations: equal to the last digit, or why not.

    Exits with 1 where a score has changed and nothing explains it.
    """
    from dataclasses import asdict

    from addenda import Registry
    from addenda.registry import headline
    from addenda.terminal import SCORES, console, print_json, table

    with Registry.open(registry, create=False) as opened:
        found = opened.history(name)
        kinds = {one.evaluation.task: opened.record(one.evaluation.task).objective for one in found}
    if as_json:
        print_json([asdict(one) for one in found])
    else:
        rows = []
        for one in found:
            evaluation, objective = one.evaluation, kinds[one.evaluation.task]
            value = evaluation.metrics.get(headline(objective))
            rows.append((
                evaluation.generation, evaluation.task, evaluation.data_fingerprint[:8],
                "–" if value is None else f"{SCORES[objective][headline(objective)]} {100 * value:.4f} %",
                one.verdict if one.verdict == "first" else f"{one.verdict}: {one.reason}",
            ))  # fmt: skip
        columns = ("generation", "task", "data", "score", "beside the one before")
        title = f"{len(rows)} scoring{'' if len(rows) == 1 else 's'} of {name}"
        console.print(table(title, columns, rows, right=columns[:1], whole=columns[:3]) if rows else title)
    if any(one.verdict == "unexplained" for one in found):
        typer.echo("A score has changed and nothing explains it. See: addenda verify --deep", err=True)
        raise typer.Exit(1)


def compare(
    one: Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")],
    other: Annotated[str, typer.Argument(help="Another.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Shows what differs between two versions: settings, data, scores by class, packages."""
    from addenda import Registry
    from addenda.terminal import console, print_json, table

    with Registry.open(registry, create=False) as opened:
        refs = [opened.record(ref).ref for ref in (one, other)]
        found = opened.compare(*refs)
    if as_json:
        print_json([difference._asdict() for difference in found])
        return
    title = f"{refs[0]} and {refs[1]} differ in {len(found)} thing{'' if len(found) == 1 else 's'}"
    rows = [(d.section, d.key, _brief(d.one), _brief(d.other)) for d in found]
    console.print(table(title, ("part", "what", *refs), rows, whole=("part",)) if rows else title)


def lineage(
    name: Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Shows what a task extends, and what extends it, as trees."""
    from dataclasses import asdict

    from addenda import Registry
    from addenda.terminal import console, print_json

    with Registry.open(registry, create=False) as opened:
        found = opened.lineage(name)
    if as_json:
        print_json(asdict(found))
        return
    console.print(_tree(found.extends, "extends" if found.extends.kin else "extends nothing"))
    console.print(_tree(found.extended_by, "is extended by" if found.extended_by.kin else "is extended by nothing"))


def _tree(root: Kin, says: str) -> Tree:
    from rich.tree import Tree

    def grow(branch: Tree, kin: Kin) -> None:
        for one in kin.kin:
            said = [*(["retired"] if one.retired else []), *(["see above"] if one.shown else [])]
            grow(branch.add(one.ref + (f" ({', '.join(said)})" if said else "")), one)
        if kin.left_out:
            branch.add(f"… and {kin.left_out} more")

    tree = Tree(f"{root.ref}{' (retired)' if root.retired else ''} {says}")
    grow(tree, root)
    return tree


def _brief(value: Any) -> str:
    """A value in a cell: figures to four digits, long texts cut, of a list of records how many."""
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return f"{len(value)} (all: --json)"
    text = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
