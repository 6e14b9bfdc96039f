"""The `backbones` commands: the available backbones, and what one task on a backbone costs."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer
from typer import Argument, Option

from addenda.commands import options
from addenda.exceptions import RegistryError
from addenda.terminal import print_result, size, table

app = typer.Typer(no_args_is_help=True, help="Backbones on which tasks can be learned.")


@app.command("list")
def backbones_list(
    pattern: Annotated[
        str, Argument(help="Pattern of timm model names; '*' matches any characters.")
    ] = "vit_*_patch16_224",
    registry: options.Registry = options.DEFAULT_REGISTRY,
    as_json: options.Json = False,
) -> None:
    """Lists backbones: those in the registry, the bundled one, and the timm models that match a pattern.

    Every backbone carries layer heads; those of plain attention also carry class tokens, memory tokens and adapters.
    """
    from addenda.backbones import catalogue

    rows: list[tuple[str, str, str, str]] = []
    with (
        suppress(RegistryError),
        options.open_registry(registry) as opened,
    ):  # without a registry, only the others are listed
        for b in opened.backbones():
            where = f"in this registry: {b['fingerprint'][:12]}… from {b['source']}"
            rows.append((b["name"], "yes", _yes(b["depth"] > 0), where))
    rows.append(("glyphs", "yes", "yes", "bundled; for the demo and tests"))
    models = list(catalogue(pattern))
    if not models:
        typer.echo(f"No timm model matches {pattern!r}; '*' matches any characters.", err=True)
    for model in models:
        reason = model.layer_heads or model.tokens or ""
        rows.append((model.name, _yes(model.layer_heads is None), _yes(model.tokens is None), reason))
    columns = ("name", "layer heads", "tokens", "detail")
    title = f"Backbones in the registry, and timm models that match {pattern!r}"
    print_result(as_json, [dict(zip(columns, row, strict=True)) for row in rows], table(title, columns, rows))


def _yes(carries: bool) -> str:
    return "yes" if carries else "no"


@app.command("show")
def backbones_show(
    name: Annotated[str, Argument(help=options.TIMM_NAME)],
    weights: options.TimmWeights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    img_size: options.ImgSize = None,
    memory: Annotated[int, Option(min=0, help="Memory tokens per layer of the task whose cost is shown.")] = 5,
    adapter_rank: Annotated[int, Option(min=0, help="Rank of that task's adapters; 0 for none.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Loads a backbone and shows its properties, and the cost of one task on it."""
    from addenda.combined import task_cost

    loaded = options.load_backbone(name, weights, mean, std, img_size, None, "cpu")
    obstacle = loaded.token_obstacle()
    if obstacle is not None and adapter_rank:
        loaded.check_tokens("--adapter-rank")
    record, cost = loaded.record(), task_cost(loaded, memory, adapter_rank)
    adapted = f" and adapters of rank {adapter_rank}" if adapter_rank else ""
    rows = [(key, str(value)) for key, value in record.items()]
    of_tokens = [
        (f"one task with {memory} memory tokens{adapted}", f"{size(cost.token_bytes)}, without its head"),
        ("its arithmetic", f"{100 * cost.relative_operations:.2f} % of the backbone's forward pass"),
    ]
    rows += of_tokens if obstacle is None else [("task tokens", f"none: {obstacle}")]
    rows += [
        (
            "a layer head, per class",
            f"{cost.num_layer_features:,} layer features, {size(4 * cost.num_layer_features)}; "
            f"{100 * cost.num_layer_features / cost.backbone_operations:.4f} % of the forward pass",
        )
    ]
    print_result(as_json, record | {"task_cost": vars(cost)}, table(name, ("", "value"), rows))
