"""Whether a registry is still what was written: every seal, hash, key, alias and trigger, checked again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, func, select

from addenda.exceptions import RegistryError
from addenda.registry.audit.contents import content_faults, key_faults
from addenda.registry.audit.faults import NO_VALUES, UNREADABLE, Fault, any_text, pages, readable, undamaged
from addenda.registry.store import ledger, schema
from addenda.registry.store.database import reading
from addenda.registry.store.upgrade import schema_faults

_PERMISSION_DENIED = "42501"  # PostgreSQL's code of the error


@dataclass(frozen=True)
class Integrity:
    """What a check of a whole registry found.

    Attributes:
        generation: the id of the last event.
        head: its digest, which stands for the whole history: noted elsewhere, it shows later that nothing was cut off.
        num_tasks: versions that there are.
        faults: what is wrong.
        unchecked: what this user has no permission to read.
    """

    generation: int
    head: str
    num_tasks: int
    faults: tuple[Fault, ...]
    unchecked: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything was checked and is right."""
        return not self.faults and not self.unchecked

    def of(self, ref: str) -> list[Fault]:
        """What is wrong with one task, `name:version`."""
        return [fault for fault in self.faults if fault.subject == ref]


def check_integrity(engine: Engine, head: str | None = None) -> Integrity:
    """Checks a registry's schema and all that it holds, as `Reader.check_integrity` says."""
    try:
        faults = [Fault("schema", said) for said in schema_faults(engine)]
    except RegistryError as error:
        faults = [Fault("schema", str(error))]
    with reading(engine) as connection:
        found = check_rows(connection, head)
    return replace(found, faults=(*faults, *found.faults))


def check_rows(connection: Connection, head: str | None = None) -> Integrity:
    """Checks all that a registry holds, as one transaction sees it; the schema is left out."""
    checks = {
        "events, aliases and tags": chain_faults,
        "tasks and their bytes": content_faults,
        "keys and numbers": key_faults,
    }
    faults: list[Fault] = []
    unchecked: list[str] = []
    for what, check in checks.items():
        try:
            with connection.begin_nested():
                faults += check(connection)
        except UNREADABLE as error:
            raised = getattr(error, "orig", None)
            said = f"{what} could not be checked: {raised or error}"
            if getattr(raised, "sqlstate", None) == _PERMISSION_DENIED:
                unchecked.append(said)
            else:
                faults.append(Fault("database", said))
    event = schema.event.c
    last = ledger.generation(connection)
    digests = readable(connection, select(event.id, event.digest), event.id, [last])
    if head is not None and connection.scalar(select(event.id).where(event.digest == head)) is None:
        faults.append(Fault("history", f"has no event with the digest {head}: events were cut off, or it is another"))
    return Integrity(
        generation=last,
        head=digests.get(last, {"digest": ""})["digest"],
        num_tasks=connection.scalar(select(func.count()).select_from(schema.task)) or 0,
        faults=tuple(dict.fromkeys(faults)),  # two checks may find the same
        unchecked=tuple(unchecked),
    )


_DOUBLES = 4
"""Digests kept of an event whose own was damaged: enough for as many of them in a row, less one."""


def chain_faults(connection: Connection) -> Iterator[Fault]:
    """Events that are missing, cannot be read or do not seal what they wrote, and aliases and tags that are otherwise.

    An event is measured against the digest that is stored with the one before it, or the one that this should have:
    so that neither a change in what an earlier event sealed nor one of its digest is held against a later one.
    """
    aliases: dict[str, str] = {}
    tags: set[tuple[str, str]] = set()
    before, expected = [""], 1
    event = schema.event.c
    with any_text(connection):
        for ids in pages(connection, event.id):
            events = readable(connection, select(schema.event), event.id, ids)
            digests = readable(connection, select(event.id, event.digest), event.id, ids)
            written = undamaged(connection, partial(_written, connection), ids)
            for number in ids:
                if number != expected:
                    before = []
                    several = number - expected > 1
                    lost = f"events {expected} to {number - 1}" if several else f"event {min(expected, number)}"
                    yield Fault(lost, "is missing, or has another number")
                told, rows = events.get(number), written.get(number)
                if told is not None:
                    _replay(told, aliases, tags)
                seals, said = _judged(told, rows, before)
                if said is not None:
                    yield from _blamed(number, told, rows, said)
                stored = [digests[number]["digest"]] if number in digests else []
                before = list(dict.fromkeys(stored if stored and stored[0] in seals else stored + seals))[:_DOUBLES]
                expected = number + 1
        yield from _unlike_replayed(connection, aliases, tags)


_Rows = Sequence[Mapping[str, Any]]


def _written(connection: Connection, ids: Sequence[int]) -> Mapping[int, _Rows]:
    """Event id -> the rows that it wrote, also where it wrote none."""
    return {number: [] for number in ids} | ledger.written(connection, ids[0], ids[-1])


def _judged(event: Mapping[str, Any] | None, rows: _Rows | None, before: Sequence[str]) -> tuple[list[str], str | None]:
    """An event's digests by those that the one before it may have, and what is wrong with it."""
    if event is None or rows is None:
        return [], "cannot be read, or what it wrote"
    try:
        seals = [ledger.seal(digest, event, rows) for digest in before]
    except NO_VALUES:
        return [], "holds what it never wrote"
    if not before:
        return [], "cannot be checked without the event before it"
    return seals, None if event["digest"] in seals else "is not as it was sealed, or what it wrote is not"


def _blamed(number: int, event: Mapping[str, Any] | None, rows: _Rows | None, said: str) -> Iterator[Fault]:
    """The fault of an event, and of all that it wrote."""
    yield Fault(f"event {number}", said)
    subjects = [] if event is None else [event["subject"]]
    for row in rows or ():
        subjects.append(row["fingerprint"] if row["table"] == "backbone" else f"{row['name']}:{row['version']}")
    for subject in dict.fromkeys(subjects):
        yield Fault(subject, f"belongs to event {number}, which {said}")


def _replay(event: Mapping[str, Any], aliases: dict[str, str], tags: set[tuple[str, str]]) -> None:
    """Has an event change where aliases point, and which tags there are."""
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


def _unlike_replayed(connection: Connection, aliases: dict[str, str], tags: set[tuple[str, str]]) -> Iterator[Fault]:
    """Aliases and tags that are otherwise than the events say; what is found is taken out of these."""
    task, alias, tag = schema.task.c, schema.alias.c, schema.tag.c
    pointed = select(alias.name, alias.alias, task.name, task.version).join_from(schema.alias, schema.task)
    for name, what, of, version in connection.execute(pointed):
        subject, found = f"{name}@{what}", f"{of}:{version}"
        said = aliases.pop(subject, "nothing")
        if said != found:
            yield Fault(subject, f"points at {found}; by the events it points at {said}")
    for subject, said in aliases.items():
        yield Fault(subject, f"is missing; by the events it points at {said}")
    tagged = select(task.name, task.version, tag.tag).join_from(schema.tag, schema.task)
    for name, version, what in connection.execute(tagged):
        if (f"{name}:{version}", what) not in tags:
            yield Fault(f"{name}:{version}", f"carries the tag {what!r}, which the events do not know")
        tags.discard((f"{name}:{version}", what))
    for subject, what in sorted(tags):
        yield Fault(subject, f"lacks the tag {what!r}, which the events gave it")
