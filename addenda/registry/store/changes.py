"""Changes of registered tasks: aliases, tags and retirement, each with its event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from addenda.exceptions import ConflictError, RegistryError
from addenda.registry.store import schema
from addenda.registry.store.ledger import Writer
from addenda.registry.store.queries import find, is_retired, ref_of, retired


def alias_version(connection: Connection, name: str, alias: str, expected: int | None = None) -> int:
    """The version that an alias points at, 0 for none; raises ConflictError unless it is the expected one."""
    query = select(schema.task.c.version).join_from(schema.alias, schema.task)
    actual = connection.scalar(query.where(_is_alias(name, alias))) or 0
    if expected is not None and actual != expected:
        targets = [f"at '{name}:{version}'" if version else "at nothing" for version in (actual, expected)]
        raise ConflictError(f"'{name}@{alias}' points {targets[0]}, not {targets[1]} as expected. Nothing was changed.")
    return actual


def set_alias(writer: Writer, row: Row[Any], alias: str, expected: int | None = None) -> int | None:
    """Points an alias at a task, see `Registry.set_alias`; returns the event's id, or None if nothing changed."""
    if is_retired(writer.connection, row):
        raise RegistryError(f"Task {ref_of(row)!r} is retired; an alias cannot point at it.")
    before = alias_version(writer.connection, row.name, alias, expected)
    if before == row.version:
        return None
    if before == 0:
        writer.connection.execute(insert(schema.alias).values(name=row.name, alias=alias, task_id=row.id))
    else:
        writer.connection.execute(update(schema.alias).where(_is_alias(row.name, alias)).values(task_id=row.id))
    return writer.append("alias", f"{row.name}@{alias}", version=row.version, before=before or None)


def remove_alias(writer: Writer, name: str, alias: str, expected: int | None) -> None:
    """Removes an alias; see `Registry.remove_alias`."""
    before = alias_version(writer.connection, name, alias, expected)
    if before == 0:
        raise RegistryError(f"There is no alias '{name}@{alias}'. See: addenda tasks list")
    writer.connection.execute(delete(schema.alias).where(_is_alias(name, alias)))
    writer.append("alias", f"{name}@{alias}", version=None, before=before)


def _is_alias(name: str, alias: str) -> Any:
    return (schema.alias.c.name == name) & (schema.alias.c.alias == alias)


def tags_of(connection: Connection, row: Row[Any]) -> set[str]:
    """The tags of a version."""
    return set(connection.scalars(select(schema.tag.c.tag).where(schema.tag.c.task_id == row.id)))


def tag(writer: Writer, row: Row[Any], tag: str) -> None:
    """Adds a tag to a version that does not have it."""
    writer.connection.execute(insert(schema.tag).values(task_id=row.id, tag=tag))
    writer.append("tagged", ref_of(row), tag=tag)


def untag(writer: Writer, row: Row[Any], tag: str) -> None:
    """Removes a tag from a version; raises RegistryError if it does not have the tag."""
    if tag not in tags_of(writer.connection, row):
        raise RegistryError(f"Task {ref_of(row)!r} does not have the tag {tag!r}.")
    writer.connection.execute(delete(schema.tag).where(schema.tag.c.task_id == row.id, schema.tag.c.tag == tag))
    writer.append("untagged", ref_of(row), tag=tag)


def retire(writer: Writer, row: Row[Any], reason: str, stamp: Mapping[str, str] | None = None) -> None:
    """Retires a version, by default by the writer and now; raises RegistryError if it is retired already."""
    if is_retired(writer.connection, row):
        raise RegistryError(f"Task {ref_of(row)!r} is already retired.")
    tombstone = {"task_id": row.id, "reason": reason, **(stamp or writer.stamp)}
    writer.add(schema.retirement, tombstone, "retired", ref_of(row), reason=reason)


def retire_family(writer: Writer, ref: str, reason: str, along: Sequence[str]) -> None:
    """Retires a version after its descendants `along`; see `Registry.retire`."""
    root = find(writer.connection, ref)
    retiring = {row.id: row for row in (root, *(find(writer.connection, descendant) for descendant in along))}
    descendants = _descendants(writer.connection, root.id)
    for row in retiring.values():
        if row.id not in descendants and row.id != root.id:
            raise RegistryError(f"Task {ref_of(row)!r} does not extend {ref_of(root)!r}; retire it separately.")
    missing = [ref_of(row) for row in descendants.values() if not row.is_retired and row.id not in retiring]
    if missing:
        raise RegistryError(
            f"Task {ref_of(root)!r} cannot be retired: active tasks extend it ({', '.join(missing)}). Retire them too, "
            "with --with TASK (in Python: along=[...])."
        )
    aliases = select(schema.alias).where(schema.alias.c.task_id.in_(retiring))
    if (alias := writer.connection.execute(aliases.order_by(schema.alias.c.alias)).first()) is not None:
        raise RegistryError(
            f"Task {ref_of(root)!r} cannot be retired: '{alias.name}@{alias.alias}' points at "
            f"{ref_of(retiring[alias.task_id])!r}, which would be retired. Move the alias or remove it: addenda tasks "
            f"alias {alias.name} {alias.alias} --remove"
        )
    # Parents have smaller ids than their children, so in descending order children are retired first.
    for task_id in sorted(retiring, reverse=True):
        retire(writer, retiring[task_id], reason)


def _descendants(connection: Connection, task_id: int) -> dict[int, Row[Any]]:
    task, edge = schema.task.c, schema.task_parent.c
    below = select(edge.task_id).where(edge.parent_id == task_id).cte("below", recursive=True)
    below = below.union(select(edge.task_id).join(below, edge.parent_id == below.c.task_id))
    query = select(task.id, task.name, task.version, retired().label("is_retired"))
    rows = connection.execute(query.where(task.id.in_(select(below.c.task_id))).order_by(task.id))
    return {row.id: row for row in rows}
