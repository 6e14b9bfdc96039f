"""What may change of a registered task: its aliases, its tags, whether it is retired; each with its event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from addenda.exceptions import ConflictError, RegistryError
from addenda.registry.store import schema
from addenda.registry.store.ledger import Writer
from addenda.registry.store.queries import find, is_retired, ref_of, retired


def pointed(connection: Connection, name: str, alias: str, expected: int | None = None) -> int:
    """The version that an alias points at, 0 for none; a ConflictError where another is expected."""
    query = select(schema.task.c.version).join_from(schema.alias, schema.task)
    found = connection.scalar(query.where(_is(name, alias))) or 0
    if expected is not None and found != expected:
        what = [f"at '{name}:{version}'" if version else "at nothing" for version in (found, expected)]
        raise ConflictError(f"'{name}@{alias}' points {what[0]}, not {what[1]} as expected. Nothing was changed.")
    return found


def point(to: Writer, row: Row[Any], alias: str, expected: int | None = None) -> int | None:
    """Points a name's alias at a task, as `Registry.set_alias` says; the event's id, None where it does already."""
    if is_retired(to.connection, row):
        raise RegistryError(f"Task {ref_of(row)!r} is retired: no alias is pointed at it.")
    before = pointed(to.connection, row.name, alias, expected)
    if before == row.version:
        return None
    if before == 0:
        to.connection.execute(insert(schema.alias).values(name=row.name, alias=alias, task_id=row.id))
    else:
        to.connection.execute(update(schema.alias).where(_is(row.name, alias)).values(task_id=row.id))
    return to.append("alias", f"{row.name}@{alias}", version=row.version, before=before or None)


def unpoint(to: Writer, name: str, alias: str, expected: int | None) -> None:
    """Lets an alias point at nothing, as `Registry.remove_alias` says."""
    before = pointed(to.connection, name, alias, expected)
    if before == 0:
        raise RegistryError(f"There is no alias '{name}@{alias}'. See: addenda tasks list")
    to.connection.execute(delete(schema.alias).where(_is(name, alias)))
    to.append("alias", f"{name}@{alias}", version=None, before=before)


def _is(name: str, alias: str) -> Any:
    return (schema.alias.c.name == name) & (schema.alias.c.alias == alias)


def tags_of(connection: Connection, row: Row[Any]) -> set[str]:
    """The tags that a version carries."""
    return set(connection.scalars(select(schema.tag.c.tag).where(schema.tag.c.task_id == row.id)))


def tag(to: Writer, row: Row[Any], tag: str) -> None:
    """Puts a tag on a version that does not carry it."""
    to.connection.execute(insert(schema.tag).values(task_id=row.id, tag=tag))
    to.append("tagged", ref_of(row), tag=tag)


def untag(to: Writer, row: Row[Any], tag: str) -> None:
    """Takes a tag off a version; raises RegistryError where it does not carry it."""
    if tag not in tags_of(to.connection, row):
        raise RegistryError(f"Task {ref_of(row)!r} does not carry the tag {tag!r}.")
    to.connection.execute(delete(schema.tag).where(schema.tag.c.task_id == row.id, schema.tag.c.tag == tag))
    to.append("untagged", ref_of(row), tag=tag)


def retire(to: Writer, row: Row[Any], reason: str) -> None:
    """Retires a version; raises RegistryError where it is retired already."""
    if is_retired(to.connection, row):
        raise RegistryError(f"Task {ref_of(row)!r} is retired already.")
    tombstone = {"task_id": row.id, "reason": reason, **to.who}
    to.add(schema.retirement, tombstone, "retired", ref_of(row), reason=reason)


def retire_family(to: Writer, ref: str, reason: str, along: Sequence[str]) -> None:
    """Retires a version, and before it those that extend it, as `Registry.retire` says."""
    root = find(to.connection, ref)
    named = {row.id: row for row in (root, *(find(to.connection, other) for other in along))}
    below = _descendants(to.connection, root.id)
    for row in named.values():
        if row.id not in below and row.id != root.id:
            raise RegistryError(f"Task {ref_of(row)!r} does not extend {ref_of(root)!r}: retire it by itself.")
    missing = [ref_of(row) for row in below.values() if not row.is_retired and row.id not in named]
    if missing:
        raise RegistryError(
            f"Task {ref_of(root)!r} cannot be retired: active tasks extend it ({', '.join(missing)}). Name them, to "
            "retire them with it."
        )
    pointed_at = select(schema.alias.c.name, schema.alias.c.alias).where(schema.alias.c.task_id.in_(named))
    if (held := to.connection.execute(pointed_at.order_by(schema.alias.c.alias)).first()) is not None:
        raise RegistryError(
            f"Task {ref_of(root)!r} cannot be retired: '{held.name}@{held.alias}' points at it, or at one "
            f"retired with it. Point that elsewhere, or at nothing: addenda tasks alias {held.name} "
            f"{held.alias} --remove"
        )
    # Parents have smaller numbers than their children: from the greatest down, no child is left behind.
    for task_id in sorted(named, reverse=True):
        retire(to, named[task_id], reason)


def _descendants(connection: Connection, task_id: int) -> dict[int, Row[Any]]:
    """The tasks that extend a task, directly or not, by id, the oldest first."""
    task, of = schema.task.c, schema.task_parent.c
    below = select(of.task_id).where(of.parent_id == task_id).cte("below", recursive=True)
    below = below.union(select(of.task_id).join(below, of.parent_id == below.c.task_id))
    query = select(task.id, task.name, task.version, retired().label("is_retired"))
    return {
        row.id: row for row in connection.execute(query.where(task.id.in_(select(below.c.task_id))).order_by(task.id))
    }
