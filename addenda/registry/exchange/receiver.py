"""Receiving what comes from another registry: everything is checked, nothing that is here is altered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from sqlalchemy import Connection, Row, select

from addenda.exceptions import IntegrityError, OwnershipError, RegistryError
from addenda.registry.audit.contents import check_stored
from addenda.registry.exchange.manifest import PROBES, BundledAlias, Contents, Entry, Parent, check_arrival
from addenda.registry.exchange.selection import Arrived, Read
from addenda.registry.store import changes, schema
from addenda.registry.store.digests import blamed
from addenda.registry.store.ledger import Writer
from addenda.registry.store.names import RESERVED, check_new_name
from addenda.registry.store.queries import find, is_retired
from addenda.registry.store.records import GoldenRow, TaskRow
from addenda.registry.store.registration import add_golden, check_bounds, derived, insert_task
from addenda.registry.store.task import Task, decode, is_finite
from addenda.registry.store.task_reader import FeatureStatistics, load_task, load_tasks, stored_in


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


def receive(to: Writer, arrived: Arrived, renames: Mapping[str, str], owner: str | None = None) -> list[Received]:
    """Adds what is not here yet, as `Registry.import_bundle` and `Registry.merge` say, under its version numbers."""
    contents, read, aliases = arrived
    arrivals = _plan(to.connection, contents.tasks, renames)
    names = {ref.partition(":")[0] for _, ref, _ in arrivals}
    foreign = {name for name in names if owner is not None and not _is_owned(to.connection, name, owner)}
    if taken := sorted({ref for _, ref, new in arrivals if new and ref.partition(":")[0] in foreign}):
        raise OwnershipError(
            f"{taken[0]!r} would be a version of a name that {owner} did not make. Whoever made it can add to it, or "
            "an admin; under another name it can be taken in."
        )
    receiver = _Receiver(to, read, foreign)
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

    def __init__(self, to: Writer, read: Read, foreign: Set[str]) -> None:
        self._to, self._read, self._connection = to, read, to.connection
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
                self._to.add(schema.backbone, vars(backbone), "backbone", backbone.fingerprint)
                self._sizes[backbone.fingerprint] = backbone.embed_dim, backbone.depth

    def take(self, entry: Entry, ref: str, new: bool) -> Received:
        """Adds a task, or to a task what it lacks."""
        said, generation, name = [], None, ref.partition(":")[0]
        with blamed(f"Task {entry.ref!r} was not taken in"):
            if new:
                generation = self._add(entry, name)
            row = self._rows[entry.task.name, entry.task.version] = find(self._connection, ref)
            if not new:
                said += self._damage(row)
                said += [] if name in self._foreign else self._add_goldens(entry, row)
        if name not in self._foreign:
            known = changes.tags_of(self._connection, row)
            for tag in (tag for tag in entry.tags if tag not in known):  # one that comes twice is refused
                changes.tag(self._to, row, tag)
                said += [] if new else [f"tagged {tag!r}"]
        if entry.retirement is not None and new:
            changes.retire(self._to, row, entry.retirement.reason)
            said.append(f"retired: {entry.retirement.reason}")
        elif entry.retirement is not None and not is_retired(self._connection, row):  # somebody may use it
            said.append(f"retired there ({entry.retirement.reason}), active here")
        return Received(ref, entry.ref, "added" if new else "there already", "; ".join(said), generation)

    def point(self, alias: BundledAlias, name: str) -> Received:
        """Points an alias as it points there, if it is free here."""
        here, there = f"{name}@{alias.alias}", f"{alias.name}@{alias.alias}"
        row = self._rows[alias.name, alias.version]
        wanted, pointed = f"'{name}:{row.version}'", changes.pointed(self._connection, name, alias.alias)
        if pointed == row.version:
            return Received(here, there, "there already")
        if pointed:
            return Received(here, there, "kept", f"points at '{name}:{pointed}' here, not at {wanted}")
        if is_retired(self._connection, row):
            return Received(here, there, "kept", f"points at nothing here, where {wanted} is retired")
        generation = changes.point(self._to, row, alias.alias)
        return Received(here, there, "added", f"points at {wanted}", generation)

    def _add(self, entry: Entry, name: str) -> int:
        """Adds a task whose every part was checked."""
        parents = [self._parent(parent) for parent in entry.parents]
        check_arrival(entry)
        artifact = self._read(entry.task.artifact)
        task = self._check(entry.task, artifact, parents)
        return insert_task(
            self._to,
            "imported",
            {**vars(entry.task), "name": name},
            artifact,
            [row.id for row in parents],
            [self._golden(task, golden) for golden in entry.goldens],
            self._statistics(entry),
            [vars(evaluation) for evaluation in entry.evaluations],
            origin=entry.ref,
        )

    def _parent(self, parent: Parent) -> Row[Any]:
        row = self._rows.get((parent.name, parent.version))
        if row is None or row.artifact != parent.sha256:
            raise IntegrityError(f"it extends '{parent.name}:{parent.version}', which does not come before it")
        return row

    def _check(self, row: TaskRow, artifact: bytes, parents: Sequence[Row[Any]]) -> Task:
        """The task of an artifact; raises IntegrityError unless it fits its row, its parents and its backbone."""
        kin = {task.sha256: task for task in load_tasks(self._connection, parents)}

        def parent(sha256: str) -> Task:
            if sha256 not in kin:
                raise IntegrityError("its artifact names a parent that its row does not")
            return kin[sha256]

        task = decode(artifact, row.artifact, parent, stored_in(row))
        named = [parent.sha256 for parent in task.parents]
        if named != [row.artifact for row in parents] or any(parent.class_token is None for parent in task.parents):
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
        """What a router knows of a task's images, as a row, where it does."""
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

    def _golden(self, task: Task, golden: GoldenRow) -> dict[str, Any]:
        """A golden probe as a row."""
        logits, count = self._read(golden.digest), len(task.labels)
        if not logits or len(logits) % (4 * count) or len(logits) > 4 * count * PROBES:
            raise IntegrityError(f"its golden probe is not of {count} labels")
        values = torch.frombuffer(bytearray(logits), dtype=torch.float32).view(-1, count)
        if not is_finite(values, task.objective, task.temperature):
            raise IntegrityError("its golden probe has logits or probabilities that are NaN or infinite")
        return {**vars(golden), "logits": logits}

    def _damage(self, row: Row[Any]) -> list[str]:
        """Says where a task that is here is damaged."""
        try:
            check_stored(self._connection, row._asdict(), {})
        except IntegrityError:
            return ["its stored bytes here are DAMAGED, and a merge does not mend them: addenda verify --deep"]
        return []

    def _add_goldens(self, entry: Entry, row: Row[Any]) -> list[str]:
        """Adds golden probes of numerics that a task has none of; says where two of the same numerics differ."""
        of, said = schema.golden.c, []
        query = select(of.numerics_fingerprint, of.digest).where(of.task_id == row.id)
        known = dict(self._connection.execute(query).all())
        for golden in entry.goldens:
            numerics = golden.numerics_fingerprint
            if numerics not in known:
                probe = self._golden(load_task(self._connection, row), golden)
                add_golden(self._to, row, probe)
                said.append(f"golden probe added (numerics {numerics[:12]}…)")
            elif known[numerics] != golden.digest:
                said.append(f"its golden probes DIFFER under the same numerics ({numerics[:12]}…): addenda verify")
        return said
