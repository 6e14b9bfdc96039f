"""The `backbones` commands: which there are, and what one task on one of them costs."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer
from typer import Argument, Option

from addenda.commands import options
from addenda.exceptions import RegistryError
from addenda.terminal import answer, size, table

app = typer.Typer(no_args_is_help=True, help="The backbones that tasks can be learned on.")


@app.command("list")
def backbones_list(
    pattern: Annotated[str, Argument(help="Pattern over timm's names.")] = "vit_*_patch16_224",
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Lists backbones: those in the registry, the package's own, and timm's that match a pattern."""
    from addenda.backbones import catalogue

    rows: list[tuple[str, str, str]] = []
    with suppress(RegistryError), options.open_registry(registry) as opened:  # without one, the rest is listed
        for b in opened.backbones():
            rows.append((b["name"], "in this registry", f"{b['fingerprint'][:12]}… from {b['source']}"))
    rows.append(("glyphs", "works", "in the package; for the demo and tests"))
    timms = catalogue(pattern)
    if not timms:
        typer.echo(f"No model of timm's matches {pattern!r}; '*' stands for any characters.", err=True)
    rows += [(n, "works" if why is None else "refused", why or "") for n, why in timms]
    columns = ("name", "status", "detail")
    shown = table(f"Backbones, timm's by the pattern {pattern!r}", columns, rows)
    answer(as_json, [dict(zip(columns, row, strict=True)) for row in rows], shown)


@app.command("show")
def backbones_show(
    name: Annotated[str, Argument(help="timm name, or 'glyphs'.")],
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    memory: Annotated[int, Option(min=0, help="Memory tokens of the task whose price is shown.")] = 5,
    adapter_rank: Annotated[int, Option(min=0, help="Rank of its adapters; 0: none, as by default.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Loads a backbone and shows it, with the price of one task on it."""
    from addenda.combined import task_cost

    loaded = options.load_backbone(name, weights, mean, std, None, "cpu")
    record, cost = loaded.record(), task_cost(loaded, memory, adapter_rank)
    adapted = f" and adapters of rank {adapter_rank}" if adapter_rank else ""
    rows = [(key, str(value)) for key, value in record.items()]
    rows += [
        (f"one task with {memory} memory tokens{adapted}", f"{size(cost.token_bytes)}, its head apart"),
        ("its arithmetic", f"{100 * cost.relative_operations:.2f} % of the backbone's pass"),
        (
            "a layer head's row",
            f"{cost.num_layer_features:,} layer features, {size(4 * cost.num_layer_features)} a class; "
            f"{100 * cost.num_layer_features / cost.backbone_operations:.4f} % of the pass",
        ),
    ]
    answer(as_json, record | {"task_cost": vars(cost)}, table(name, ("", "value"), rows))
