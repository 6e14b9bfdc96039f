"""The options that several commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import addenda
from addenda.exceptions import BackboneError, DataError

if TYPE_CHECKING:
    from addenda.distributed.cluster import Workplace

DEFAULT_REGISTRY = "addenda.db"
DEFAULT_BACKBONE = "vit_base_patch16_224.augreg_in21k"

Registry = Annotated[
    str, Option("--registry", envvar="ADDENDA_REGISTRY", help="Path or URL of the registry.", show_default=True)
]
Backbone = Annotated[str | None, Option("--backbone", help="timm name, or 'glyphs'. Default: the registry's own.")]
Weights = Annotated[Path | None, Option("--weights", help="Local weights file of the backbone.")]
Mean = Annotated[str | None, Option("--mean", help="Normalisation: one number or three with commas.")]
Std = Annotated[str | None, Option("--std", help="Normalisation: one number or three with commas.")]
Precision = Annotated[str | None, Option("--precision", help="float32 (default) or bfloat16.")]
Device = Annotated[str, Option("--device", help="cpu, cuda, cuda:1, or auto.")]
Json = Annotated[bool, Option("--json", help="Print JSON for programs.")]
CacheGb = Annotated[
    float | None, Option(help="Most that kept activations take on disk; 0 keeps none. Default: half of what is free.")
]
NewVersion = Annotated[bool, Option("--new-version", help="Add a version to a name already taken.")]
SkipBad = Annotated[bool, Option("--skip-bad", help="Leave out images that cannot be read.")]
Ref = Annotated[str, Argument(help="NAME, NAME:VERSION or NAME@ALIAS.")]


def open_registry(location: str, create: bool = False) -> addenda.Registry:
    """A registry, which must be there unless it may be made."""
    return addenda.Registry.open(location, create=create)


def numbers(text: str | None) -> tuple[float, ...] | None:
    """Reads a mean or a standard deviation: '0.5' -> (0.5, 0.5, 0.5); '0.1,0.2,0.3' -> those."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BackboneError(f"{text!r} is not one number, nor three with commas between them.") from error
    return values * 3 if len(values) == 1 else values


def learn_settings(file: Path | None, given: dict[str, Any], augmentation: dict[str, Any]) -> addenda.LearnConfig:
    """Settings of a task and of its views by precedence: defaults, file, what the command line gave (not None)."""
    from addenda.learner import read_mapping

    values = {} if file is None else read_mapping(file)
    varied = {key: value for key, value in augmentation.items() if value is not None}
    own = values.get("augmentation") or {}
    if varied and isinstance(own, dict):
        values["augmentation"] = own | varied
    return addenda.LearnConfig.parse(values | {key: value for key, value in given.items() if value is not None})


def single(values: list[Any] | None) -> Any:
    """An option that may be given again, given once: its one value; anything else stays."""
    return values[0] if values is not None and len(values) == 1 else values


def ranks(given: list[str] | None) -> Any:
    """--adapter-rank as the configuration has it: the word auto, or whole numbers."""
    if given is None or given == ["auto"]:
        return single(given)
    if not all(rank.isdecimal() for rank in given):
        raise DataError(f"--adapter-rank is {' '.join(given)!r}: give whole numbers, or the one word auto.")
    return single([int(rank) for rank in given])


def backbone_to_learn_on(
    registry: addenda.Registry,
    name: Backbone,
    weights: Weights,
    mean: Mean,
    std: Std,
    precision: Precision,
    device: Device,
) -> addenda.FrozenBackbone:
    """The backbone as the options describe it; where only its name is given, or nothing, the registry's own."""
    from addenda.combined import recorded_backbone

    records = registry.backbones()
    described = [option for option, value in (("--mean", mean), ("--std", std), ("--precision", precision)) if value]
    if name is None and records:
        if described:
            wrong = " and ".join(described)
            raise BackboneError(
                f"{wrong} would make another backbone than the registry's own: name it with --backbone."
            )
        return recorded_backbone(registry, weights, device)
    if not described and weights is None and [b["name"] for b in records].count(name or "") == 1:
        return recorded_backbone(registry, None, device, name=name)
    return load_backbone(name or DEFAULT_BACKBONE, weights, mean, std, precision, device)


def load_backbone(
    name: str, weights: Weights, mean: Mean, std: Std, precision: Precision, device: Device
) -> addenda.FrozenBackbone:
    """A backbone as the options describe it."""
    return addenda.load_backbone(name, weights, numbers(mean), numbers(std), precision or "float32", device)


def workplace(
    location: str, opened: addenda.Registry, weights: Weights, device: Device, gpus: float | None, backbone: str | None
) -> Workplace:
    """What the workers of a cluster open, by absolute paths; one without a share of a GPU computes on the CPU."""
    from addenda.distributed.cluster import Workplace

    return Workplace(
        location if location.startswith("postgresql") else opened.location,
        backbone,
        None if weights is None else str(weights.absolute()),
        "cpu" if device == "auto" and not gpus else device,
    )
