"""Receiving what comes from another registry: everything is checked, nothing that is here is altered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from sqlalchemy import Connection, Row, Table, insert, select

from addenda.exceptions import IntegrityError, OwnershipError, RegistryError
from addenda.registry import ledger, schema
from addenda.registry.arrivals import PROBES, check_arrival
from addenda.registry.artifact import decode
from addenda.registry.bounds import check_bounds, is_finite
from addenda.registry.contents import wrong
from addenda.registry.gathering import Read
from addenda.registry.loading import load_tasks
from addenda.registry.manifest import Alias, Contents, Entry, Golden, Parent
from addenda.registry.queries import find, is_retired
from addenda.registry.registration import derived, insert_task
from addenda.registry.statistics import FeatureStatistics
from addenda.registry.task import RESERVED, Task, check_new_name


@dataclass(frozen=True)
class Received:
    """What became of a task, or of an alias, that came from another registry.

    Attributes:
        ref: what it is called here: `name:version` or `name@alias`.
        origin: what it was called there.
        state: "added"; "there already", left as it was; "kept": an alias that points elsewhere here.
        detail: what else there is to say, in one line.
        generation: the generation that began with it; None where it was not added.
    """

    ref: str
    origin: str
    state: str
    detail: str = ""
    generation: int | None = None


def receive(
    connection: Connection,
    contents: Contents,
    read: Read,
    renames: Mapping[str, str],
    aliases: Sequence[Alias],
    source: str,
    who: Mapping[str, str],
    owner: str | None = None,
) -> list[Received]:
    """Adds what is not here yet, inside a write transaction.

    Content that this registry holds under the same name is there already: only golden probes of other numerics and
    tags that it lacks are added to it. All else keeps its version number.

    Args:
        connection: of the transaction.
        contents: what has come.
        read: gives its bytes.
        renames: a name there -> its name here.
        aliases: to be pointed as they point there, where they are free.
        source: where it comes from, for the events.
        who: who does it, and when.
        owner: who may touch only names that are free or their own; None may touch all.

    Raises:
        OwnershipError: a new version of a name that is not the owner's.
        RegistryError: a version number holds other content here; all of these are named.
        IntegrityError: something is not what it says it is.
    """
    arrivals = _plan(connection, contents.tasks, renames)
    names = {ref.partition(":")[0] for _, ref, _ in arrivals}
    foreign = {name for name in names if owner is not None and not _is_owned(connection, name, owner)}
    if taken := sorted({ref for _, ref, new in arrivals if new and ref.partition(":")[0] in foreign}):
        raise OwnershipError(
            f"{taken[0]!r} would be a version of a name that {owner} did not make. Whoever made it can add to it, or "
            "an admin; under another name it can be taken in."
        )
    receiver = _Receiver(connection, read, source, who, foreign)
    receiver.add_backbones(contents, owner)
    received = [receiver.take(entry, ref, new) for entry, ref, new in arrivals]
    return received + [receiver.point(alias, renames.get(alias.name, alias.name)) for alias in aliases]


def _is_owned(connection: Connection, name: str, owner: str) -> bool:
    """Whether all versions of a name were registered or imported in one name."""
    event = schema.event.c
    made = event.kind.in_(("registered", "imported")) & event.subject.startswith(f"{name}:", autoescape=True)
    return set(connection.scalars(select(event.created_by).where(made).distinct())) <= {owner}


def _plan(
    connection: Connection, entries: Sequence[Entry], renames: Mapping[str, str]
) -> list[tuple[Entry, str, bool]]:
    """What each task is called here, and whether it is new."""
    names = {entry.task.name for entry in entries}
    if strangers := sorted(renames.keys() - names):
        raise RegistryError(f"There is no {strangers[0]!r} to rename: the tasks are {', '.join(sorted(names))}.")
    for name in renames.values():
        check_new_name(name)
    task, held, versions, conflicts = schema.task.c, {}, {}, []
    for name in sorted({renames.get(name, name) for name in names}):
        query = select(task.version, task.artifact).where(task.name == name)
        for version, sha256 in connection.execute(query):
            held[name, version], versions[name, sha256] = sha256, version
    plan = []
    for entry in entries:
        name, sha256 = renames.get(entry.task.name, entry.task.name), entry.task.artifact
        version = versions.setdefault((name, sha256), entry.task.version)
        found = held.get((name, version))
        if found is not None and found != sha256:
            conflicts.append(f"'{name}:{version}' ({found[:12]}… is not {sha256[:12]}…)")
        if found is None and name in RESERVED:
            raise RegistryError(f"No task can be called {name!r}: {RESERVED[name]}. Rename it: --rename {name}=NEW.")
        held[name, version] = found or sha256
        plan.append((entry, f"{name}:{version}", found is None))
    if conflicts:
        raise RegistryError(
            f"Names clash, so nothing was changed; these hold other content: {', '.join(conflicts)}. Take tasks in "
            "under another name with --rename OLD=NEW (in Python: renames={OLD: NEW})."
        )
    return plan


class _Receiver:
    """Writes to one transaction what comes from one source."""

    def __init__(
        self, connection: Connection, read: Read, source: str, who: Mapping[str, str], foreign: Set[str]
    ) -> None:
        self._connection, self._read, self._source, self._who = connection, read, source, who
        self._foreign = foreign  # names to which nothing is added
        self._rows: dict[tuple[str, int], Row[Any]] = {}  # by what they are called there
        self._sizes: dict[str, tuple[int, int]] = {}  # width and depth of each backbone

    def add_backbones(self, contents: Contents, owner: str | None) -> None:
        """Records those that are not known; their sizes are what they say, so it takes one who may be believed."""
        of, used = schema.backbone.c, {entry.task.backbone for entry in contents.tasks}
        for row in self._connection.execute(select(of.fingerprint, of.embed_dim, of.depth)):
            self._sizes[row.fingerprint] = row.embed_dim, row.depth
        for backbone in contents.backbones:
            if backbone.fingerprint not in used:
                raise IntegrityError(f"It brings backbone {backbone.name!r}, on which none of its tasks was learned.")
            if backbone.fingerprint not in self._sizes:
                if owner is not None:
                    raise OwnershipError(
                        f"Backbone {backbone.name!r} ({backbone.fingerprint[:12]}…) is not known here, and {owner} "
                        "may not add one. An admin can."
                    )
                self._add_row(schema.backbone, backbone.model_dump(), "backbone", backbone.fingerprint)
                self._sizes[backbone.fingerprint] = backbone.embed_dim, backbone.depth

    def take(self, entry: Entry, ref: str, new: bool) -> Received:
        """Adds a task, or to a task what it lacks."""
        try:
            generation = self._add(entry, ref.partition(":")[0]) if new else None
            row = find(self._connection, ref)
            said = [] if new else self._damage(row)
            is_foreign = ref.partition(":")[0] in self._foreign
            said += [] if new or is_foreign else self._add_goldens(entry, row, ref)
        except IntegrityError as error:
            raise IntegrityError(f"Task {entry.ref!r} was not taken in: {str(error).rstrip('.')}.") from error
        self._rows[entry.task.name, entry.task.version] = row
        said += [] if is_foreign else self._add_tags(entry.tags, row, ref, new)
        if entry.retirement is not None:
            said += self._retire(entry.retirement.reason, row, ref, new)
        return Received(ref, entry.ref, "added" if new else "there already", "; ".join(said), generation)

    def point(self, alias: Alias, name: str) -> Received:
        """Points an alias as it points there, if it is free here."""
        here, there = f"{name}@{alias.alias}", f"{alias.name}@{alias.alias}"
        row, of = self._rows[alias.name, alias.version], schema.alias.c
        pointed = self._connection.scalar(
            select(schema.task.c.version)
            .join(schema.alias, of.task_id == schema.task.c.id)
            .where(of.name == name, of.alias == alias.alias)
        )
        if pointed is None and self._connection.scalar(select(is_retired()).where(schema.task.c.id == row.id)):
            return Received(here, there, "kept", f"points at nothing here, where '{name}:{row.version}' is retired")
        if pointed is None:
            self._connection.execute(insert(schema.alias).values(name=name, alias=alias.alias, task_id=row.id))
            generation = self._append("alias", here, version=row.version, before=None)
            return Received(here, there, "added", f"points at '{name}:{row.version}'", generation)
        if pointed == row.version:
            return Received(here, there, "there already")
        return Received(here, there, "kept", f"points at '{name}:{pointed}' here, not at '{name}:{row.version}'")

    def _add(self, entry: Entry, name: str) -> int:
        """Adds a task whose every part was checked."""
        parents = [self._parent(parent) for parent in entry.parents]
        check_arrival(entry)
        artifact = self._read(entry.task.artifact)
        task = self._check(entry, artifact, parents)
        return insert_task(
            self._connection,
            "imported",
            {**entry.task.model_dump(), "name": name},
            artifact,
            [row.id for row in parents],
            [self._golden(task, golden) for golden in entry.goldens],
            self._statistics(entry),
            [evaluation.model_dump() for evaluation in entry.evaluations],
            self._who,
            source=self._source,
            origin=entry.ref,
        )

    def _parent(self, parent: Parent) -> Row[Any]:
        row = self._rows.get((parent.name, parent.version))
        if row is None or row.artifact != parent.sha256:
            raise IntegrityError(f"it extends '{parent.name}:{parent.version}', which does not come before it")
        return row

    def _check(self, entry: Entry, artifact: bytes, parents: Sequence[Row[Any]]) -> Task:
        """The task of an artifact; raises IntegrityError unless it fits its row, its parents and its backbone."""
        kin = {task.sha256: task for task in load_tasks(self._connection, parents)}
        named: list[str] = []

        def parent(sha256: str) -> Task:
            named.append(sha256)
            if sha256 not in kin:
                raise IntegrityError("its artifact names a parent that its row does not")
            return kin[sha256]

        row = entry.task
        stored = {"name": row.name, "version": row.version, "config": row.config, "metrics": row.metrics}
        task = decode(artifact, row.artifact, parent, {**stored, "data": row.data})
        if named != [row.artifact for row in parents] or any(task.class_token is None for task in kin.values()):
            raise IntegrityError("its row names other parents than its artifact, or one without a token")
        try:
            facts = derived(task)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise IntegrityError(f"its metrics are not valid: {error}") from error
        if wrong := [column for column, value in facts.items() if getattr(row, column) != value]:
            raise IntegrityError(f"its row says otherwise than its artifact or its metrics: {', '.join(wrong)}")
        width, depth = self._sizes.get(row.backbone, (0, 0))
        if task.head_weight.shape[1] != width or (task.memory is not None and len(task.memory) != depth):
            raise IntegrityError("its tensors do not fit its backbone, or this is not there")
        try:
            check_bounds(task)
        except RegistryError as error:
            raise IntegrityError(str(error)) from error
        return task

    def _statistics(self, entry: Entry) -> dict[str, Any] | None:
        """What a router knows of a task's images, as a row."""
        if entry.statistics is None:
            return None
        data = self._read(entry.statistics)
        found = FeatureStatistics.decode(data, entry.statistics, len(entry.task.labels))
        width, _ = self._sizes[entry.task.backbone]
        if found.sample.shape[1] != width:
            raise IntegrityError(f"its statistics are of {found.sample.shape[1]} dimensions, its backbone of {width}")
        if found.excess:
            raise IntegrityError(f"its {found.excess}")
        return {"sha256": entry.statistics, "data": data}

    def _golden(self, task: Task, golden: Golden) -> dict[str, Any]:
        """A golden probe as a row."""
        logits, count = self._read(golden.digest), len(task.labels)
        if not logits or len(logits) % (4 * count) or len(logits) > 4 * count * PROBES:
            raise IntegrityError(f"its golden probe is not of {count} labels")
        values = torch.frombuffer(bytearray(logits), dtype=torch.float32).view(-1, count)
        if not is_finite(values, task.objective, task.temperature):
            raise IntegrityError("its golden probe has logits or probabilities that are NaN or infinite")
        return {**golden.model_dump(), "logits": logits}

    def _damage(self, row: Row[Any]) -> list[str]:
        """Says of a task that is there already whether its stored bytes are still its own."""
        if wrong(self._connection, row._asdict(), {}) is None:
            return []
        return ["its stored bytes here are DAMAGED, and a merge does not mend them: addenda verify --deep"]

    def _add_goldens(self, entry: Entry, row: Row[Any], ref: str) -> list[str]:
        """Adds golden probes of numerics that a task has none of; says where two of the same numerics differ."""
        of, said = schema.golden.c, []
        query = select(of.numerics_fingerprint, of.digest).where(of.task_id == row.id)
        known = {row.numerics_fingerprint: row.digest for row in self._connection.execute(query)}
        for golden in entry.goldens:
            numerics = golden.numerics_fingerprint
            if numerics not in known:
                task = load_tasks(self._connection, [row])[0]
                probe = {"task_id": row.id, **self._golden(task, golden)}
                self._add_row(schema.golden, probe, "golden", ref, numerics=numerics)
                said.append(f"golden probe added (numerics {numerics[:12]}…)")
            elif known[numerics] != golden.digest:
                said.append(f"its golden probes DIFFER under the same numerics ({numerics[:12]}…): addenda verify")
        return said

    def _add_tags(self, tags: Sequence[str], row: Row[Any], ref: str, new: bool) -> list[str]:
        of = schema.tag.c
        known = set(self._connection.scalars(select(of.tag).where(of.task_id == row.id)))
        lacking = [tag for tag in tags if tag not in known]
        for tag in lacking:
            self._connection.execute(insert(schema.tag).values(task_id=row.id, tag=tag))
            self._append("tagged", ref, tag=tag)
        return [f"tagged {tag!r}" for tag in lacking if not new]

    def _retire(self, reason: str, row: Row[Any], ref: str, new: bool) -> list[str]:
        """Retires a task that is new here; another stays as it is, for somebody may use it."""
        if new:
            retirement = {"task_id": row.id, "reason": reason, **self._who}
            self._add_row(schema.retirement, retirement, "retired", ref, reason=reason)
            return [f"retired: {reason}"]
        here = select(schema.retirement.c.task_id).where(schema.retirement.c.task_id == row.id)
        return [] if self._connection.scalar(here) else [f"retired there ({reason}), active here"]

    def _add_row(self, table: Table, row: Mapping[str, Any], kind: str, subject: str, **details: Any) -> None:
        ledger.add(self._connection, table, row, kind, subject, self._who, **details, source=self._source)

    def _append(self, kind: str, subject: str, **details: Any) -> int:
        return ledger.append(self._connection, kind, subject, self._who, **details, source=self._source)
