"""The options that several commands share, their defaults, and how a list of numbers is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from addenda.exceptions import BackboneError

DEFAULT_REGISTRY = "addenda.db"
DEFAULT_BACKBONE = "vit_base_patch16_224.augreg_in21k"

RegistryOption = Annotated[
    str, typer.Option("--registry", envvar="ADDENDA_REGISTRY", help="Path or URL of the registry.", show_default=True)
]
BackboneOption = Annotated[
    str | None, typer.Option("--backbone", help="timm name, or 'glyphs'. Default: the registry's own.")
]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="Local weights file of the backbone.")]
MeanOption = Annotated[str | None, typer.Option("--mean", help="Normalisation: one number or three with commas.")]
StdOption = Annotated[str | None, typer.Option("--std", help="Normalisation: one number or three with commas.")]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="float32 (default) or bfloat16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, or auto.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
CacheOption = Annotated[
    float | None,
    typer.Option(help="Most that kept activations take on disk; 0 keeps none. Default: half of what is free."),
]
NewVersionOption = Annotated[bool, typer.Option("--new-version", help="Add a version to a name already taken.")]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")]


def numbers(text: str | None) -> tuple[float, ...] | None:
    """Reads a mean or a standard deviation: '0.5' -> (0.5, 0.5, 0.5); '0.1,0.2,0.3' -> those.

    Raises:
        BackboneError: a part of the text is no number.
    """
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BackboneError(f"{text!r} is not one number, nor three with commas between them.") from error
    return values * 3 if len(values) == 1 else values
