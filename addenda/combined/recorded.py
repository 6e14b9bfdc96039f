"""Loads the backbone recorded in a registry."""

from __future__ import annotations

from pathlib import Path

from addenda.backbones import FrozenBackbone, load_backbone
from addenda.exceptions import BackboneError, IntegrityError
from addenda.registry import Registry


def recorded_backbone(
    registry: Registry, weights: str | Path | None, device: str, fingerprint: str | None = None, name: str | None = None
) -> FrozenBackbone:
    """Loads the registry's only backbone, or the one with a given fingerprint or name, and checks its fingerprint.

    `weights` is a local file; None uses the recorded source.

    Raises:
        BackboneError: no backbone or several match, or the recorded weights file no longer exists.
        IntegrityError: weights or preprocessing differ from the record.
    """
    records = [b for b in registry.backbones() if fingerprint in (None, b["fingerprint"]) and name in (None, b["name"])]
    if not records:
        raise BackboneError(f"The registry {registry.location!r} has no tasks yet. Add one with `addenda learn`.")
    if len(records) > 1:
        names = ", ".join(b["name"] for b in records)
        raise BackboneError(
            f"The registry has tasks on several backbones ({names}). Name a task, pass --backbone (`learn`), or serve "
            "each backbone from its own registry (`serve`)."
        )
    (record,) = records
    recorded_path = record["source"] if record["source"] not in ("hub", "embedded") else None
    if weights is None and recorded_path is not None and not Path(recorded_path).exists():
        raise BackboneError(
            f"The weights of {record['name']!r} are no longer at {recorded_path!r}. Pass --weights FILE."
        )
    preprocessing = record["preprocessing"]
    loaded = load_backbone(
        record["name"],
        weights or recorded_path,
        preprocessing["mean"],
        preprocessing["std"],
        record["precision"],
        device,
        preprocessing["input_size"][1:],
        preprocessing["crop_pct"],
    )
    if loaded.preprocessing != preprocessing:
        raise IntegrityError(
            f"Backbone {record['name']!r} as loaded has preprocessing {loaded.preprocessing}; "
            f"the registry's tasks were learned with {preprocessing}. Use the version of timm that they were "
            "learned with, and run `addenda verify --deep`."
        )
    if loaded.fingerprint != record["fingerprint"]:
        raise IntegrityError(
            f"Backbone {record['name']!r} as loaded from {str(weights or record['source'])!r} has fingerprint "
            f"{loaded.fingerprint[:12]}…; the registry's tasks were learned on {record['fingerprint'][:12]}…. "
            "The weights differ; pass the right ones with --weights FILE."
        )
    return loaded
