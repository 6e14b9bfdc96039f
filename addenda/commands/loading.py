"""What a command works on: settings, the backbone to learn on, and what the workers of a cluster open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.commands.options import DEFAULT_BACKBONE, numbers
from addenda.exceptions import BackboneError, DataError

if TYPE_CHECKING:
    from addenda import FrozenBackbone, LearnConfig, Registry
    from addenda.distributed.cluster import Workplace


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
