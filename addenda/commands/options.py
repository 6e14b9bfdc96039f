"""The options that several commands share, their defaults, and how a list of numbers is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from addenda.exceptions import BackboneError, DataError

if TYPE_CHECKING:
    from addenda import FrozenBackbone, LearnConfig, Registry
    from addenda.distributed.cluster import Workplace


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


def learn_settings(file: Path | None, given: dict[str, Any], augmentation: dict[str, Any]) -> LearnConfig:
    """Settings of a task and of its random views by precedence: defaults, file, what the command line gave (not None).

    Raises:
        DataError: the file cannot be read, or is no mapping.
        TrainingError: a setting is unknown or out of range.
    """
    from addenda import LearnConfig
    from addenda.learner import read_mapping

    values = {} if file is None else read_mapping(file)
    varied = {key: value for key, value in augmentation.items() if value is not None}
    own = values.get("augmentation") or {}
    if varied and isinstance(own, dict):
        values["augmentation"] = own | varied
    return LearnConfig.parse(values | {key: value for key, value in given.items() if value is not None})


def single(values: list[Any] | None) -> Any:
    """An option that may be given again, given once: its one value; anything else stays."""
    return values[0] if values is not None and len(values) == 1 else values


def ranks(given: list[str] | None) -> Any:
    """--adapter-rank as the configuration has it: the word auto, or whole numbers.

    Raises:
        DataError: a rank is no whole number.
    """
    if given is None or given == ["auto"]:
        return single(given)
    if not all(rank.isdecimal() for rank in given):
        raise DataError(f"--adapter-rank is {' '.join(given)!r}: give whole numbers, or the one word auto.")
    return single([int(rank) for rank in given])


def backbone_to_learn_on(
    registry: Registry,
    name: str | None,
    weights: Path | None,
    mean: str | None,
    std: str | None,
    precision: str | None,
    device: str,
) -> FrozenBackbone:
    """The backbone as the options describe it; where only its name is given, or nothing, the registry's own.

    Raises:
        BackboneError: it is described, not named, and the registry has its own; or it cannot be loaded.
        IntegrityError: the registry's own has other weights or another preprocessing than it was recorded with.
    """
    from addenda import load_backbone
    from addenda.combined import recorded_backbone

    records = registry.backbones()
    described = [option for option, value in (("--mean", mean), ("--std", std), ("--precision", precision)) if value]
    if name is None and records:
        if described:
            raise BackboneError(
                f"{' and '.join(described)} would make another backbone than the registry's own: "
                "name it with --backbone."
            )
        return recorded_backbone(registry, weights, device)
    if not described and weights is None and [b["name"] for b in records].count(name or "") == 1:
        return recorded_backbone(registry, None, device, name=name)
    return load_backbone(name or DEFAULT_BACKBONE, weights, numbers(mean), numbers(std), precision or "float32", device)


def workplace(
    registry: str, opened: Registry, weights: Path | None, device: str, gpus: float | None, backbone: str | None = None
) -> Workplace:
    """What the workers of a cluster open, by absolute paths; one without a share of a GPU computes on the CPU."""
    from addenda.distributed.cluster import Workplace

    return Workplace(
        registry if registry.startswith("postgresql") else opened.location,
        backbone,
        None if weights is None else str(weights.absolute()),
        "cpu" if device == "auto" and not gpus else device,
    )
