"""How a name's versions scored over time, and whether what changed has a reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, select

from addenda.registry.store import schema
from addenda.registry.store.queries import evaluations, find
from addenda.registry.store.records import EvaluationRecord, TaskRecord

_PER_CLASS = "per_class"


class VersionDifference(NamedTuple):
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


def compare(one: TaskRecord, other: TaskRecord) -> list[VersionDifference]:
    """What differs between two versions, section by section; nothing where all is shared but who, when and number."""
    others = _sections(other)
    return [
        VersionDifference(section, *found)
        for section, ours in _sections(one).items()
        for found in _differing(ours, others[section])
    ]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, one value and the other, where two nested mappings differ; lists are values."""
    ours, theirs = dict(_flat(one)), dict(_flat(other))
    pairs = {path: (ours.get(path), theirs.get(path)) for path in ours | theirs}
    return [(".".join(path), mine, yours) for path, (mine, yours) in pairs.items() if mine != yours]


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


Verdict = Literal["first", "another version", "equal", "other numerics", "unexplained"]


@dataclass(frozen=True)
class Scored:
    """One scoring, measured against the earlier one of the same version on the same data.

    Of several earlier ones it is the last under the same numerics, else the last.

    Attributes:
        evaluation: what was recorded.
        against: the event of the earlier one; None where there is none.
        verdict: the `first` of its data; of `another version` than those scored on its data so far; `equal`, to the
            last digit and bit; `other numerics`, which are the reason of a difference; `unexplained`: other bits or
            other figures under the same numerics.
        reason: more of it, in words.
    """

    evaluation: EvaluationRecord
    against: int | None
    verdict: Verdict
    reason: str


def history(connection: Connection, name: str) -> list[Scored]:
    """Every scoring of every version of a name: data by data, and on each the oldest first."""
    task = schema.task.c
    if connection.scalar(select(task.id).where(task.name == name)) is None:
        find(connection, name)
    recorded, golden = evaluations(connection, task.name == name), schema.golden.c
    numerics: _Numerics = {}
    for fingerprint in {record.numerics_fingerprint for record in recorded}:
        probed = select(golden.numerics).where(golden.numerics_fingerprint == fingerprint).limit(1)
        numerics[fingerprint] = connection.scalar(probed)
    by_data: dict[str, list[EvaluationRecord]] = {}
    for record in recorded:
        by_data.setdefault(record.data_fingerprint, []).append(record)
    return [_scored(found[:i], found[i], numerics) for found in by_data.values() for i in range(len(found))]


_Numerics = dict[str, Mapping[str, Any] | None]
"""What numerics fingerprints stand for; None where no golden probe of any task was made under them."""


def _scored(before: list[EvaluationRecord], now: EvaluationRecord, numerics: _Numerics) -> Scored:
    """A scoring, measured against those before it on the same data."""
    own = [record for record in before if record.task == now.task]
    if not own:
        if not before:
            return Scored(now, None, "first", "the first scoring on this data")
        return Scored(now, None, "another version", f"the first scoring of {now.task} on this data")
    # Sorting is stable: of the same numerics, else of all, the last.
    earlier = sorted(own, key=lambda record: record.numerics_fingerprint == now.numerics_fingerprint)[-1]
    same = earlier.numerics_fingerprint == now.numerics_fingerprint
    figures = _differing(earlier.metrics, now.metrics)
    if earlier.logits_digest == now.logits_digest and not figures:
        reason = "to the last digit and bit" + ("" if same else ", under other numerics")
        return Scored(now, earlier.event_id, "equal", reason)
    if not same:
        change = _change(earlier.numerics_fingerprint, now.numerics_fingerprint, numerics)
        return Scored(now, earlier.event_id, "other numerics", change)
    if _method(earlier) != _method(now) and all(_close(one, other) for _, one, other in figures):
        return Scored(now, earlier.event_id, "equal", "in its figures; version 0.1 hashed logits in another order")
    what = "the same logits" if earlier.logits_digest == now.logits_digest else "other logits"
    changed = ", ".join(f"{key} {one} -> {other}" for key, one, other in figures) or "the same metrics"
    return Scored(now, earlier.event_id, "unexplained", f"{what} under the same numerics: {changed}")


def _method(evaluation: EvaluationRecord) -> str:
    """How its logits were hashed: what stands before the colon of the digest, where version 0.1 has none."""
    return evaluation.logits_digest.rpartition(":")[0]


def _close(one: Any, other: Any) -> bool:
    """Whether two figures may be one sum, added up in another order."""
    return isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6)


def _change(one: str, other: str, numerics: _Numerics) -> str:
    """How two numerics differ, in words."""
    before, after = numerics[one], numerics[other]
    if before is None or after is None:
        unknown = " and ".join(f"{fingerprint[:12]}…" for fingerprint in (one, other) if numerics[fingerprint] is None)
        return f"what numerics {unknown} were is not known: no golden probe was recorded under them"
    return ", ".join(f"{key} {old} -> {new}" for key, old, new in _differing(before, after))
