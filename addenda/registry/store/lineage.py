"""The ancestors and descendants of a task, as trees of bounded size."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Column, Connection, func, select

from addenda.registry.store import schema
from addenda.registry.store.queries import find, ref_column, retired

MAX_EDGES = 500
MAX_DEPTH = 50
"""Limits of one tree; `Kin.left_out` counts the tasks that were omitted."""


@dataclass(frozen=True)
class Kin:
    """A node of a lineage tree.

    Attributes:
        ref: `name:version`.
        retired: whether the task is retired.
        kin: parents of the task, or children, by the direction of the tree.
        repeated: whether the task's kin are listed at another node, nearer to the root, and not here.
        left_out: number of kin omitted here.
    """

    ref: str
    retired: bool
    kin: tuple[Kin, ...] = ()
    repeated: bool = False
    left_out: int = 0


@dataclass(frozen=True)
class Lineage:
    """A task's lineage.

    Attributes:
        extends: the tree of ancestors, with the task as its root.
        extended_by: the tree of descendants, with the task as its root.
    """

    extends: Kin
    extended_by: Kin


def lineage(connection: Connection, ref: str) -> Lineage:
    """The ancestors and descendants of a task, including retired ones."""
    root = find(connection, ref)
    child, parent = schema.task_parent.c.task_id, schema.task_parent.c.parent_id
    return Lineage(_tree(connection, root.id, child, parent), _tree(connection, root.id, parent, child))


def _tree(connection: Connection, root: int, source: Column[int], target: Column[int]) -> Kin:
    """Builds a tree breadth-first, so that a task reached by several paths is expanded nearest to the root."""
    level, order, remaining = [root], [root], MAX_EDGES
    kin: dict[int, list[tuple[int, bool]]] = {}
    counts: dict[int, int] = {}
    for depth in range(MAX_DEPTH + 1):
        count_query = select(source, func.count()).where(source.in_(level)).group_by(source)
        counts |= dict(connection.execute(count_query).all())
        if depth == MAX_DEPTH:
            break
        edge_query = select(source, target).where(source.in_(level))
        edge_query = edge_query.order_by(source, schema.task_parent.c.position, target)
        edges = connection.execute(edge_query.limit(remaining)).all()
        remaining, level = remaining - len(edges), []
        for task_id, kin_id in edges:
            seen = kin_id in order or kin_id in level
            kin.setdefault(task_id, []).append((kin_id, seen))
            if not seen:
                level.append(kin_id)
        order += level
    task_query = select(schema.task.c.id, ref_column(schema.task), retired()).where(schema.task.c.id.in_(order))
    tasks = {task_id: (ref, is_retired) for task_id, ref, is_retired in connection.execute(task_query)}
    nodes: dict[int, Kin] = {}
    for task_id in reversed(order):
        edges_below = kin.get(task_id, [])
        children = [Kin(*tasks[kin_id], repeated=True) if seen else nodes[kin_id] for kin_id, seen in edges_below]
        nodes[task_id] = Kin(*tasks[task_id], tuple(children), left_out=counts.get(task_id, 0) - len(children))
    return nodes[root]
