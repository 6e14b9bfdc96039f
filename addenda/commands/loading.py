"""Which backbone a command works on: the one that is asked for, or the one that its registry names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from addenda.commands.options import DEFAULT_BACKBONE, numbers
from addenda.exceptions import BackboneError, IntegrityError

if TYPE_CHECKING:
    from addenda import FrozenBackbone, Registry


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


def recorded_backbone(
    registry: Registry, weights: Path | None, device: str, fingerprint: str | None = None, name: str | None = None
) -> FrozenBackbone:
    """Loads the registry's one backbone, or that of a fingerprint or name, and checks its fingerprint.

    Args:
        registry: The registry that names it.
        weights: A local file of its weights. Default: where they were when it was recorded.
        device: cpu, cuda, cuda:1, or auto.
        fingerprint: The fingerprint of the one that is meant.
        name: The name of the one that is meant.

    Returns:
        The backbone, loaded.

    Raises:
        BackboneError: The registry has none such, or several; or its weights are gone.
        IntegrityError: It has other weights or another preprocessing than it was recorded with.
    """
    from addenda import load_backbone

    records = [b for b in registry.backbones() if fingerprint in (None, b["fingerprint"]) and name in (None, b["name"])]
    if not records:
        raise BackboneError(f"The registry {registry.location!r} holds no task yet. `addenda learn` adds one.")
    if len(records) > 1:
        names = ", ".join(b["name"] for b in records)
        raise BackboneError(
            f"The registry holds tasks on several backbones ({names}): name a task, or for `learn` one with --backbone."
        )
    (record,) = records
    given = record["source"] if record["source"] not in ("hub", "embedded") else None
    if weights is None and given is not None and not Path(given).exists():
        raise BackboneError(f"The weights of {record['name']!r} are no longer at {given!r}. Say where: --weights FILE.")
    preprocessing = record["preprocessing"]
    loaded = load_backbone(
        record["name"], weights or given, preprocessing["mean"], preprocessing["std"], record["precision"], device
    )
    if loaded.preprocessing != preprocessing:
        raise IntegrityError(
            f"The backbone {record['name']!r} as loaded prepares images by {loaded.preprocessing}; "
            f"the registry's tasks were learned with {preprocessing}."
        )
    if loaded.fingerprint != record["fingerprint"]:
        raise IntegrityError(
            f"The backbone {record['name']!r} as loaded from {str(weights or record['source'])!r} has fingerprint "
            f"{loaded.fingerprint[:12]}…; the registry's tasks were learned on {record['fingerprint'][:12]}…. "
            "These are other weights."
        )
    return loaded
