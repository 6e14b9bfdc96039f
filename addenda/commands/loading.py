"""What a command works on: the backbone to learn on, and what the workers of a cluster open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from addenda.commands.options import DEFAULT_BACKBONE, numbers
from addenda.exceptions import BackboneError

if TYPE_CHECKING:
    from addenda import FrozenBackbone, Registry
    from addenda.distributed.cluster import Workplace


def backbone_to_learn_on(
    registry: Registry,
    name: str | None,
    weights: Path | None,
    mean: str | None,
    std: str | None,
    precision: str | None,
    device: str,
) -> FrozenBackbone:
    """The backbone as it is described; where only its name is given, or nothing, the registry's own.

    Args:
        registry: The registry that the tasks go into.
        name: timm's name, or 'glyphs'.
        weights: A local file of its weights.
        mean: Normalisation, as --mean gives it.
        std: Normalisation, as --std gives it.
        precision: float32 or bfloat16.
        device: cpu, cuda, cuda:1, or auto.

    Returns:
        The backbone, loaded.

    Raises:
        BackboneError: It is described, not named, and the registry has its own; or it cannot be loaded.
        IntegrityError: The registry's own has other weights or another preprocessing than it was recorded with.
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
    """What the workers of a cluster open, from a command's options.

    Args:
        registry: The registry, as it was given.
        opened: The same, open.
        weights: A file of the backbone's weights.
        device: cpu, cuda, or auto: where a worker has no share of a GPU, the CPU.
        gpus: A worker's share of a GPU.
        backbone: The backbone's fingerprint.

    Returns:
        What each worker opens, by absolute paths.
    """
    from addenda.distributed.cluster import Workplace

    return Workplace(
        registry if registry.startswith("postgresql") else opened.location,
        backbone,
        None if weights is None else str(weights.absolute()),
        "cpu" if device == "auto" and not gpus else device,
    )
