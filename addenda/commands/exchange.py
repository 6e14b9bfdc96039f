"""Tasks between registries: bundles written and taken in, registries merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from addenda.commands.options import DEFAULT_REGISTRY, JsonOption, RegistryOption, WeightsOption
from addenda.exceptions import RegistryError

if TYPE_CHECKING:
    from addenda.registry import Received


RenameOption = Annotated[
    list[str] | None, typer.Option(help="OLD=NEW: call a task otherwise here; may be given again.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would be done; the registry must be there.")
]


def export(
    names: Annotated[list[str], typer.Argument(help="NAME, NAME:VERSION or NAME@ALIAS; what they extend comes along.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle to write, such as birds.addenda.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Writes tasks to a bundle, one file that another registry can import."""
    from addenda import Registry
    from addenda.terminal import size

    with Registry.open(registry, create=False) as opened:
        refs = opened.export(names, out)
    typer.echo(f"{out}: {', '.join(refs)}; {size(out.stat().st_size)}.")


def import_(
    bundle: Annotated[Path, typer.Argument(help="A file that `addenda tasks export` wrote.")],
    rename: RenameOption = None,
    dry_run: DryRunOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Takes in a bundle's tasks, all of them or none; makes the registry where there is none."""
    from addenda import Registry

    with Registry.open(registry, create=not dry_run) as opened:
        _show(opened.import_bundle(bundle, _renames(rename), dry_run), dry_run, as_json)


def merge(
    other: Annotated[str, typer.Argument(help="Path or URL of the registry to take tasks from; it stays as it is.")],
    rename: RenameOption = None,
    dry_run: DryRunOption = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Takes in every task of another registry, with retirements and free aliases, all of them or none."""
    from addenda import Registry

    with Registry.open(other, read_only=True) as source, Registry.open(registry, create=not dry_run) as opened:
        _show(opened.merge(source, _renames(rename), dry_run), dry_run, as_json)


def _renames(given: Sequence[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in given or ()]
    for old, equals, new in pairs:
        if not (old and equals and new):
            raise RegistryError(f"--rename takes OLD=NEW, not {old + equals + new!r}.")
    return {old: new for old, _, new in pairs}


def _show(received: Sequence[Received], dry_run: bool, as_json: bool) -> None:
    from addenda.terminal import console, print_json, table

    if as_json:
        print_json([vars(one) for one in received])
        return
    added = sum(one.state == "added" and "@" not in one.ref for one in received)  # aliases are told in their rows
    would = "would be" if dry_run else "were" if added != 1 else "was"
    title = f"{added} task{'' if added == 1 else 's'} {would} added" + (", nothing was changed" if dry_run else "")
    rows = [(one.ref, one.origin if one.origin != one.ref else "", one.state, one.detail) for one in received]
    console.print(table(title, ("here", "there", "", "detail"), rows, whole=("here",)))


def export_model(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: NAME.pt2, or NAME.onnx for onnx.")],
    tasks: Annotated[
        str | None,
        typer.Option(help="NAME, NAME:VERSION or NAME@ALIAS, several with commas. Default: all active ones."),
    ] = None,
    format: Annotated[str, typer.Option(help="torch-export or onnx.")] = "torch-export",
    registry: RegistryOption = DEFAULT_REGISTRY,
    weights: WeightsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Writes the combined model of some tasks to one file that runs without Addenda: images in, each task's logits out.

    Before the file is put in place, its answers to the golden probes are compared with the recorded ones. They agree
    within a tolerance; equal bits are promised by Addenda's own pass alone.
    """
    from addenda import Registry, exporting
    from addenda.combined import recorded_backbone
    from addenda.terminal import print_json, size

    with Registry.open(registry, create=False) as opened:
        chosen = [opened.get(ref.strip()) for ref in tasks.split(",")] if tasks is not None else []
        backbone = recorded_backbone(opened, weights, "cpu", chosen[0].backbone if chosen else None)
        made = exporting.export_model(opened, backbone, chosen or opened.load(backbone), out, format)
    if as_json:
        print_json(vars(made))
        return
    typer.echo(f"{made.path}: {', '.join(made.tasks)}; {made.format}, {size(made.size_bytes)}.")
    typer.echo(
        f"Its answers to the golden probes deviate by {made.deviation:.1e} of the largest logit at most; "
        f"{made.tolerance:g} is allowed."
    )
