"""Loads the backbone recorded in a registry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from addenda.backbones import FrozenBackbone, load_backbone
from addenda.exceptions import BackboneError, IntegrityError
from addenda.registry import Registry

SHORT = 12
"""Digits of a fingerprint that stand for it; messages show so many."""


def recorded_backbone(
    registry: Registry, weights: str | Path | None, device: str, which: str | None = None
) -> FrozenBackbone:
    """Loads a registry's backbone, and checks its fingerprint.

    Args:
        registry: the registry.
        weights: a local file; None uses the recorded source.
        device: the device to load it on.
        which: its name, its fingerprint or at least the first 12 digits of it; None in a registry of one backbone.

    Raises:
        BackboneError: no backbone or several match, or the recorded weights file no longer exists.
        IntegrityError: weights or preprocessing differ from the record.
    """
    registered = registry.backbones()
    if not registered:
        raise BackboneError(f"The registry {registry.location!r} has no tasks yet. Add one with `addenda learn`.")
    records = [record for record in registered if which is None or _is(record, which)]
    if len(records) != 1:
        listed = ", ".join(f"{record['name']} ({record['fingerprint'][:SHORT]})" for record in records or registered)
        raise BackboneError(
            f"The registry has {'several backbones' if records else f'no backbone {which!r}'}: {listed}. Choose one "
            "with --backbone, by its name or by the digits of its fingerprint."
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
            f"{loaded.fingerprint[:SHORT]}…; the registry's tasks were learned on {record['fingerprint'][:SHORT]}…. "
            "The weights differ; pass the right ones with --weights FILE."
        )
    return loaded


def _is(record: Mapping[str, Any], which: str) -> bool:
    return which == record["name"] or (len(which) >= SHORT and record["fingerprint"].startswith(which))
