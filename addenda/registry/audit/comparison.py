"""Two versions side by side: what differs in how they were made, what from, how good they are and what they weigh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from addenda.registry.store.records import TaskRecord

_PER_CLASS = "per_class"


class Difference(NamedTuple):
    """One thing that two versions do not share.

    Attributes:
        section: task, config, data, metrics, per class, packages, parents or sizes.
        key: what of it, nested keys joined by dots.
        one: the first version's, None where it has none.
        other: the second's.
    """

    section: str
    key: str
    one: Any
    other: Any


def compare(one: TaskRecord, other: TaskRecord) -> list[Difference]:
    """What differs between two versions, section by section; nothing where all is shared but who, when and number."""
    return [
        Difference(section, *found)
        for section, of_one in _sections(one).items()
        for found in differing(of_one, _sections(other)[section])
    ]


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key, one value and the other, where two nested mappings differ; lists are values."""
    flat_one, flat_other = dict(_flat(one)), dict(_flat(other))
    for path in dict.fromkeys((*flat_one, *flat_other)):
        values = flat_one.get(path), flat_other.get(path)
        if values[0] != values[1]:
            yield ".".join(path), *values


def _flat(value: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, (*path, key))
        else:
            yield (*path, key), inner


def _sections(record: TaskRecord) -> dict[str, Mapping[str, Any]]:
    def named(*names: str) -> dict[str, Any]:
        return {name: getattr(record, name) for name in names}

    flat = dict(_flat(record.metrics))
    return {
        "task": named("backbone", "objective", "retired"),
        "config": record.config,
        "data": {"labels": list(record.labels), **record.data},
        "metrics": {".".join(path): value for path, value in flat.items() if _PER_CLASS not in path},
        "per class": {
            ".".join(part for part in path if part != _PER_CLASS): value
            for path, value in flat.items()
            if _PER_CLASS in path
        },
        "packages": {"addenda": record.code_version, **record.packages},
        "parents": {"extends": list(record.extends)},
        "sizes": named("num_parameters", "num_memory_tokens", "size_bytes", "statistics_bytes"),
    }
