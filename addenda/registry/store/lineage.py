"""What a task extends and what extends it, as trees that are bounded whatever the registry holds."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Column, Connection, func, select

from addenda.registry.store import schema
from addenda.registry.store.queries import find, ref_column, retired

MOST = 500
DEEPEST = 50
"""Tasks that one tree shows, and how far from the one that was asked for; it says how many it leaves out."""


@dataclass(frozen=True)
class Kin:
    """A task in a tree.

    Attributes:
        ref: `name:version`.
        retired: whether it is.
        kin: the next ones on the way that the tree goes.
        shown: whether it stands elsewhere in the tree, nearer to the root, with its kin; here it has none.
        left_out: how many more of its kin there are than the tree shows.
    """

    ref: str
    retired: bool
    kin: tuple[Kin, ...] = ()
    shown: bool = False
    left_out: int = 0


@dataclass(frozen=True)
class Lineage:
    """A task's family.

    Attributes:
        extends: the task, and as its kin what it extends, and what these extend.
        extended_by: the task, and as its kin what extends it, and what extends these.
    """

    extends: Kin
    extended_by: Kin


def lineage(connection: Connection, ref: str) -> Lineage:
    """The ancestors and the descendants of a task, retired ones too."""
    root = find(connection, ref)
    child, parent = schema.task_parent.c.task_id, schema.task_parent.c.parent_id
    return Lineage(_tree(connection, root.id, child, parent), _tree(connection, root.id, parent, child))


def _tree(connection: Connection, root: int, here: Column[int], there: Column[int]) -> Kin:
    """Goes level by level, so that a task that several ways lead to stands where it is nearest."""
    level, order, room = [root], [root], MOST
    kin: dict[int, list[tuple[int, bool]]] = {}
    counts: dict[int, int] = {}
    for depth in range(DEEPEST + 1):
        counted = select(here, func.count()).where(here.in_(level)).group_by(here)
        counts |= dict(connection.execute(counted).all())
        if depth == DEEPEST:
            break
        query = select(here, there).where(here.in_(level)).order_by(here, schema.task_parent.c.position, there)
        found = connection.execute(query.limit(room)).all()
        room, level = room - len(found), []
        for one, other in found:
            kin.setdefault(one, []).append((other, other in order or other in level))
            if not kin[one][-1][1]:
                level.append(other)
        order += level
    described = select(schema.task.c.id, ref_column(schema.task), retired()).where(schema.task.c.id.in_(order))
    tasks = {number: (ref, is_retired) for number, ref, is_retired in connection.execute(described)}
    made: dict[int, Kin] = {}
    for number in reversed(order):
        near = [Kin(*tasks[other], shown=True) if shown else made[other] for other, shown in kin.get(number, [])]
        made[number] = Kin(*tasks[number], tuple(near), left_out=counts.get(number, 0) - len(near))
    return made[root]
