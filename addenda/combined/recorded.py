"""The backbone that a registry's tasks were learned on."""

from __future__ import annotations

from pathlib import Path

from addenda.backbones import FrozenBackbone, load_backbone
from addenda.exceptions import BackboneError, IntegrityError
from addenda.registry import Registry


def recorded_backbone(
    registry: Registry, weights: str | Path | None, device: str, fingerprint: str | None = None, name: str | None = None
) -> FrozenBackbone:
    """Loads the registry's one backbone, or that of a fingerprint or name, and checks its fingerprint.

    Its weights are read from a local file, by default from where they were when it was recorded.

    Raises:
        BackboneError: the registry has none such, or several; or its weights are gone.
        IntegrityError: it has other weights or another preprocessing than it was recorded with.
    """
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
