"""The `backbones` commands: which there are, and what one task on one of them costs."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from addenda.commands.options import (
    DEFAULT_REGISTRY,
    JsonOption,
    MeanOption,
    RegistryOption,
    StdOption,
    WeightsOption,
    numbers,
)
from addenda.exceptions import RegistryError

app = typer.Typer(no_args_is_help=True, help="The backbones that tasks can be learned on.")


@app.command("list")
def backbones_list(
    pattern: Annotated[str, typer.Argument(help="Pattern over timm's names.")] = "vit_*_patch16_224",
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Lists backbones: those in the registry, the package's own, and timm's that match a pattern."""
    from addenda import Registry
    from addenda.backbones import catalogue
    from addenda.terminal import console, print_json, table

    rows: list[tuple[str, str, str]] = []
    with suppress(RegistryError), Registry.open(registry, create=False) as opened:  # without one, the rest is listed
        rows = [
            (b["name"], "in this registry", f"{b['fingerprint'][:12]}… from {b['source']}") for b in opened.backbones()
        ]
    rows.append(("glyphs", "works", "in the package; for the demo and tests"))
    timms = catalogue(pattern)
    if not timms:
        typer.echo(f"No model of timm's matches {pattern!r}; '*' stands for any characters.", err=True)
    rows += [(n, "works" if why is None else "refused", why or "") for n, why in timms]
    if as_json:
        print_json([{"name": n, "status": s, "detail": d} for n, s, d in rows])
        return
    console.print(table(f"Backbones, timm's by the pattern {pattern!r}", ("name", "status", "detail"), rows))


@app.command("show")
def backbones_show(
    name: Annotated[str, typer.Argument(help="timm name, or 'glyphs'.")],
    weights: WeightsOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    memory: Annotated[int, typer.Option(min=0, help="Memory tokens of the task whose price is shown.")] = 5,
    adapter_rank: Annotated[int, typer.Option(min=0, help="Rank of its adapters; 0: none, as by default.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Loads a backbone and shows it, with the price of one task on it."""
    from addenda import load_backbone
    from addenda.combined import task_cost
    from addenda.terminal import console, print_json, size, table

    loaded = load_backbone(name, weights, numbers(mean), numbers(std), device="cpu")
    record = loaded.record()
    cost = task_cost(loaded, memory, adapter_rank)
    if as_json:
        print_json(record | {"task_cost": vars(cost)})
        return
    adapted = f" and adapters of rank {adapter_rank}" if adapter_rank else ""
    rows = [(key, str(value)) for key, value in record.items()]
    rows += [
        (f"one task with {memory} memory tokens{adapted}", f"{size(cost.token_bytes)}, its head apart"),
        ("its arithmetic", f"{100 * cost.relative_operations:.2f} % of the backbone's pass"),
    ]
    console.print(table(name, ("", "value"), rows))
