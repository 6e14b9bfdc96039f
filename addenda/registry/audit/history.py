"""The evaluations of a name's versions over time, and the reason for each change."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, select

from addenda.registry.store import schema
from addenda.registry.store.queries import evaluations, find, plain_name
from addenda.registry.store.records import EvaluationRecord, TaskRecord
from addenda.text import differences, flattened

_PER_CLASS = "per_class"
_Numerics = dict[str, Mapping[str, Any] | None]
"""Numerics by fingerprint; None if no task has a golden probe under them."""


class VersionDifference(NamedTuple):
    """One difference between two versions.

    Attributes:
        section: task, config, data, metrics, per class, packages, parents or sizes.
        key: the key within the section, nested keys joined by dots.
        one: the first version's value; None if it has none.
        other: the second version's value; None if it has none.
    """

    section: str
    key: str
    one: Any
    other: Any


def compare(one: TaskRecord, other: TaskRecord) -> list[VersionDifference]:
    """The differences between two versions, section by section; author, time and version number do not count."""
    sections = zip(_sections(one).items(), _sections(other).values(), strict=True)
    return [VersionDifference(name, *found) for (name, a), b in sections for found in differences(a, b)]


def _sections(record: TaskRecord) -> dict[str, Mapping[str, Any]]:
    def attributes(*names: str) -> dict[str, Any]:
        return {name: getattr(record, name) for name in names}

    metrics = dict(flattened(record.metrics))
    return {
        "task": attributes("backbone", "objective", "retired"),
        "config": record.config,
        "data": {"labels": list(record.labels), **record.data},
        "metrics": {".".join(path): value for path, value in metrics.items() if _PER_CLASS not in path},
        "per class": {
            ".".join(key for key in path if key != _PER_CLASS): value
            for path, value in metrics.items()
            if _PER_CLASS in path
        },
        "packages": {"addenda": record.code_version, **record.packages},
        "parents": {"extends": list(record.extends)},
        "sizes": attributes("num_parameters", "num_memory_tokens", "size_bytes", "statistics_bytes"),
    }


Verdict = Literal["first", "another version", "equal", "other numerics", "unexplained"]


@dataclass(frozen=True)
class ComparedEvaluation:
    """An evaluation, compared with the previous one of the same version on the same data.

    The previous one is the latest under the same numerics, or else the latest.

    Attributes:
        evaluation: the recorded evaluation.
        against: event id of the previous evaluation; None if there is none.
        verdict: `first`: the first evaluation on this data. `another version`: only other versions were evaluated on
            it before. `equal`: the same metrics and bitwise identical logits. `other numerics`: a difference, explained
            by a numerics change. `unexplained`: other metrics or other logits under the same numerics.
        reason: the verdict's explanation.
    """

    evaluation: EvaluationRecord
    against: int | None
    verdict: Verdict
    reason: str


def history(connection: Connection, name: str) -> list[ComparedEvaluation]:
    """All evaluations of all versions of a name, grouped by data, the oldest first."""
    task = schema.task.c
    if connection.scalar(select(task.id).where(task.name == name)) is None:
        find(connection, plain_name(name))
    golden, numerics, by_data = schema.golden.c, _Numerics(), defaultdict[str, list[EvaluationRecord]](list)
    for record in evaluations(connection, task.name == name):
        by_data[record.data_fingerprint].append(record)
        if (fingerprint := record.numerics_fingerprint) not in numerics:
            query = select(golden.numerics).where(golden.numerics_fingerprint == fingerprint).limit(1)
            numerics[fingerprint] = connection.scalar(query)
    return [_compare(group[:i], group[i], numerics) for group in by_data.values() for i in range(len(group))]


def _compare(before: list[EvaluationRecord], now: EvaluationRecord, numerics: _Numerics) -> ComparedEvaluation:
    if not before:
        return ComparedEvaluation(now, None, "first", "the first evaluation on this data")
    same_version = [record for record in before if record.task == now.task]
    if not same_version:
        return ComparedEvaluation(now, None, "another version", f"the first evaluation of {now.task} on this data")
    # Sorting is stable: the latest under the same numerics, or else the latest.
    previous = sorted(same_version, key=lambda record: record.numerics_fingerprint == now.numerics_fingerprint)[-1]
    same_numerics = previous.numerics_fingerprint == now.numerics_fingerprint
    changed = differences(previous.metrics, now.metrics)
    if previous.logits_digest == now.logits_digest and not changed:
        reason = "the same metrics; logits bitwise identical" + ("" if same_numerics else ", under other numerics")
        return ComparedEvaluation(now, previous.event_id, "equal", reason)
    if not same_numerics:
        change = _numerics_change(previous.numerics_fingerprint, now.numerics_fingerprint, numerics)
        return ComparedEvaluation(now, previous.event_id, "other numerics", change)
    # The prefix of a logits digest identifies the order of hashing; version 0.1 wrote none.
    same_hash = previous.logits_digest.rpartition(":")[0] == now.logits_digest.rpartition(":")[0]
    if not same_hash and all(_close(old, new) for _, old, new in changed):
        reason = "the same metrics; version 0.1 hashed logits in another order"
        return ComparedEvaluation(now, previous.event_id, "equal", reason)
    logits = "the same logits" if previous.logits_digest == now.logits_digest else "other logits"
    metrics = ", ".join(f"{key} {old} -> {new}" for key, old, new in changed) or "the same metrics"
    reason = f"{logits} under the same numerics: {metrics}"
    return ComparedEvaluation(now, previous.event_id, "unexplained", reason)


def _close(first: Any, second: Any) -> bool:
    """Whether two metrics may be the same sum, added up in another order."""
    both_floats = isinstance(first, float) and isinstance(second, float)
    return both_floats and math.isclose(first, second, rel_tol=1e-5, abs_tol=1e-6)


def _numerics_change(first: str, second: str, numerics: _Numerics) -> str:
    before, after = numerics[first], numerics[second]
    if before is None or after is None:
        unknown = " and ".join(f"{f[:12]}…" for f in (first, second) if numerics[f] is None)
        return f"numerics {unknown} are unknown: no golden probe was recorded under them"
    return ", ".join(f"{key} {old} -> {new}" for key, old, new in differences(before, after))
