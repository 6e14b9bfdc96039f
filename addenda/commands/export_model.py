"""Exporting: the combined model of some tasks as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from addenda.commands.options import DEFAULT_REGISTRY, JsonOption, RegistryOption, WeightsOption


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
