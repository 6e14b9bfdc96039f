"""Integrity check of a whole registry: digests, references, aliases, tags and triggers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Engine, func, select

from addenda.exceptions import RegistryError
from addenda.registry.audit.faults import (
    READ_ERRORS,
    VALUE_ERRORS,
    Fault,
    content_faults,
    key_faults,
    lenient_text,
    pages,
    read_undamaged,
    readable_rows,
)
from addenda.registry.store import ledger, schema
from addenda.registry.store.database import reading
from addenda.registry.store.upgrade import schema_faults

_PERMISSION_DENIED = "42501"  # PostgreSQL error code


@dataclass(frozen=True)
class Integrity:
    """Result of an integrity check.

    Attributes:
        generation: the id of the last event.
        head: the last event's digest, which covers the whole history. Record it elsewhere, and a later check against
            it detects a truncated history.
        num_tasks: number of task versions.
        faults: the faults.
        unchecked: checks that were skipped for lack of permission.
    """

    generation: int
    head: str
    num_tasks: int
    faults: tuple[Fault, ...]
    unchecked: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything was checked and no fault was found."""
        return not self.faults and not self.unchecked

    def of(self, ref: str) -> list[Fault]:
        """The faults of one task, `name:version`."""
        return [fault for fault in self.faults if fault.subject == ref]


def check_integrity(engine: Engine, head: str | None = None) -> Integrity:
    """Checks a registry's schema and contents; see `Reader.check_integrity`."""
    try:
        faults = [Fault("schema", message) for message in schema_faults(engine)]
    except RegistryError as error:
        faults = [Fault("schema", str(error))]
    with reading(engine) as connection:
        contents = check_rows(connection, head)
    return replace(contents, faults=(*faults, *contents.faults))


def check_rows(connection: Connection, head: str | None = None) -> Integrity:
    """Checks a registry's contents, without its schema, within one transaction."""
    checks = {
        "events, aliases and tags": chain_faults,
        "tasks and their bytes": content_faults,
        "keys and ids": key_faults,
    }
    faults: list[Fault] = []
    unchecked: list[str] = []
    for what, check in checks.items():
        try:
            with connection.begin_nested():
                faults += check(connection)
        except READ_ERRORS as error:
            cause = getattr(error, "orig", None) or error
            message = f"{what} could not be checked: {cause}"
            if getattr(cause, "sqlstate", None) == _PERMISSION_DENIED:
                unchecked.append(message)
            else:
                faults.append(Fault("database", message))
    event, last = schema.event.c, ledger.generation(connection)
    digests = readable_rows(connection, select(event.id, event.digest), event.id, [last])
    if head is not None and connection.scalar(select(event.id).where(event.digest == head)) is None:
        message = f"has no event with digest {head}: events were removed, or the digest is of another registry"
        faults.append(Fault("history", message))
    return Integrity(
        generation=last,
        head=digests.get(last, {"digest": ""})["digest"],
        num_tasks=connection.scalar(select(func.count()).select_from(schema.task)) or 0,
        faults=tuple(dict.fromkeys(faults)),  # two checks may report the same fault
        unchecked=tuple(unchecked),
    )


_Rows = list[dict[str, Any]]
_MAX_DIGESTS = 4
"""Candidate digests carried past a damaged event; enough for three damaged digests in a row."""


def chain_faults(connection: Connection) -> Iterator[Fault]:
    """Yields events that are missing, unreadable or changed, and aliases and tags that do not match the events.

    The digest of an event is checked against the stored digest of the event before it and against the recomputed one,
    so that a change to an event, or to its digest, is not reported for the events after it.
    """
    aliases: dict[str, str] = {}
    tags: set[tuple[str, str]] = set()
    before, expected, event = [""], 1, schema.event.c

    def read_written(ids: Sequence[int]) -> dict[int, _Rows]:
        return {event_id: [] for event_id in ids} | ledger.written(connection, ids[0], ids[-1])

    with lenient_text(connection):
        for ids in pages(connection, event.id):
            events = readable_rows(connection, select(schema.event), event.id, ids)
            digests = readable_rows(connection, select(event.id, event.digest), event.id, ids)
            written = read_undamaged(connection, read_written, ids)
            for event_id in ids:
                if event_id != expected:
                    before = []
                    several = event_id - expected > 1
                    missing = f"events {expected} to {event_id - 1}" if several else f"event {min(expected, event_id)}"
                    yield Fault(missing, "is missing, or has another id")
                columns, rows = events.get(event_id), written.get(event_id)
                if columns is not None:
                    _replay(columns, aliases, tags)
                seals, message = _check_event(columns, rows, before)
                if message is not None:
                    yield from _event_faults(event_id, columns, rows, message)
                stored = [digests[event_id]["digest"]] if event_id in digests else []
                candidates = stored if stored and stored[0] in seals else stored + seals
                before = list(dict.fromkeys(candidates))[:_MAX_DIGESTS]
                expected = event_id + 1
        yield from _replay_faults(connection, aliases, tags)


def _check_event(
    event: Mapping[str, Any] | None, rows: _Rows | None, before: Sequence[str]
) -> tuple[list[str], str | None]:
    """An event's digest for each candidate digest of the event before it, and its fault, or None."""
    if event is None or rows is None:
        return [], "cannot be read, or a row that it wrote cannot be read"
    try:
        seals = [ledger.seal(digest, event, rows) for digest in before]
    except VALUE_ERRORS:
        return [], "contains invalid values"
    if not before:
        return [], "cannot be checked without the event before it"
    if event["digest"] in seals:
        return seals, None
    return seals, "does not match its digest: it or a row that it wrote was changed"


def _event_faults(event_id: int, event: Mapping[str, Any] | None, rows: _Rows | None, message: str) -> Iterator[Fault]:
    """The fault of an event, and of everything that it wrote."""
    yield Fault(f"event {event_id}", message)
    subjects = [] if event is None else [event["subject"]]
    for row in rows or ():
        subjects.append(row["fingerprint"] if row["table"] == "backbone" else f"{row['name']}:{row['version']}")
    for subject in dict.fromkeys(subjects):
        yield Fault(subject, f"was written by a damaged event: event {event_id} {message}")


def _replay(event: Mapping[str, Any], aliases: dict[str, str], tags: set[tuple[str, str]]) -> None:
    """Applies an event to the aliases and tags."""
    subject, details = event["subject"], event["details"]
    match event["kind"], details:
        case "alias", {"version": None}:
            aliases.pop(subject, None)
        case "alias", {"version": version}:
            aliases[subject] = f"{subject.partition('@')[0]}:{version}"
        case "tagged", {"tag": tag}:
            tags.add((subject, tag))
        case "untagged", {"tag": tag}:
            tags.discard((subject, tag))


def _replay_faults(connection: Connection, aliases: dict[str, str], tags: set[tuple[str, str]]) -> Iterator[Fault]:
    """Yields stored aliases and tags that differ from the replayed ones; consumes both arguments."""
    task, alias, tag = schema.task.c, schema.alias.c, schema.tag.c
    alias_query = select(alias.name, alias.alias, task.name, task.version).join_from(schema.alias, schema.task)
    for name, alias_name, task_name, version in connection.execute(alias_query):
        subject, stored = f"{name}@{alias_name}", f"{task_name}:{version}"
        expected = aliases.pop(subject, "nothing")
        if expected != stored:
            yield Fault(subject, f"points at {stored}; according to the events, at {expected}")
    for subject, expected in aliases.items():
        yield Fault(subject, f"is missing; according to the events, it points at {expected}")
    tag_query = select(task.name, task.version, tag.tag).join_from(schema.tag, schema.task)
    for name, version, tag_name in connection.execute(tag_query):
        if (f"{name}:{version}", tag_name) not in tags:
            yield Fault(f"{name}:{version}", f"has the tag {tag_name!r}, which no event added")
        tags.discard((f"{name}:{version}", tag_name))
    for subject, tag_name in sorted(tags):
        yield Fault(subject, f"lacks the tag {tag_name!r}, which an event added")
