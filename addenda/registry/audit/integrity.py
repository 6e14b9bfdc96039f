"""Whether a registry is still what was written: every seal, hash, key, alias and trigger, checked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sqlalchemy import Connection, Engine, func, select

from addenda.exceptions import RegistryError
from addenda.registry.audit.chain import chain_faults
from addenda.registry.audit.contents import content_faults, key_faults
from addenda.registry.audit.faults import UNREADABLE, Fault, readable
from addenda.registry.store import ledger, schema
from addenda.registry.store.database import reading
from addenda.registry.store.upgrade import schema_faults

_CHECKS: dict[str, Callable[[Connection], Iterator[Fault]]] = {
    "events, aliases and tags": chain_faults,
    "tasks and their bytes": content_faults,
    "keys and numbers": key_faults,
}
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
    faults: list[Fault] = []
    unchecked: list[str] = []
    for what, check in _CHECKS.items():
        try:
            with connection.begin_nested():
                faults += check(connection)
        except UNREADABLE as error:
            said = f"{what} could not be checked: {getattr(error, 'orig', None) or error}"
            if getattr(getattr(error, "orig", None), "sqlstate", None) == _PERMISSION_DENIED:
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
        # Two checks may find the same.
        faults=tuple(dict.fromkeys(faults)),
        unchecked=tuple(unchecked),
    )
