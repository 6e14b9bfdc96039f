"""Importing tasks from another registry: everything is checked, and existing tasks are not altered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from sqlalchemy import Connection, Row, select

from addenda.exceptions import IntegrityError, OwnershipError, RegistryError
from addenda.registry.audit.faults import check_stored
from addenda.registry.exchange.bundle import ReadBlob, Transfer
from addenda.registry.exchange.manifest import MAX_PROBE_IMAGES, BundledAlias, Contents, Entry, check_arrival
from addenda.registry.store import changes, schema
from addenda.registry.store.digests import integrity_errors
from addenda.registry.store.ledger import Writer
from addenda.registry.store.names import RESERVED, check_new_name
from addenda.registry.store.queries import find, is_retired, retired
from addenda.registry.store.records import GoldenRow, TaskRow
from addenda.registry.store.registration import add_golden, check_bounds, derived, insert_task
from addenda.registry.store.task import Task, decode, is_finite
from addenda.registry.store.task_reader import FeatureStatistics, load_task, load_tasks, row_fields


@dataclass(frozen=True)
class Received:
    """The result of importing one task or alias.

    Attributes:
        ref: its reference in this registry: `name:version` or `name@alias`.
        origin: its reference in the source.
        state: "added"; "there already": it exists; "kept": this registry's alias points elsewhere and was not moved.
        detail: further information, in one line.
        generation: the generation after it was added; None if it was not.
    """

    ref: str
    origin: str
    state: str
    detail: str = ""
    generation: int | None = None


def receive(writer: Writer, transfer: Transfer, renames: Mapping[str, str], owner: str | None = None) -> list[Received]:
    """Imports tasks under their version numbers; see `Registry.import_bundle` and `Registry.merge`."""
    contents, read, aliases = transfer
    plan = _plan(writer.connection, contents.tasks, renames)
    names = {ref.partition(":")[0] for _, ref, _ in plan}
    foreign = {name for name in names if owner is not None and not _is_owned(writer.connection, name, owner)}
    if refused := sorted({ref for _, ref, new in plan if new and ref.partition(":")[0] in foreign}):
        raise OwnershipError(
            f"{refused[0]!r} cannot be imported: {owner} did not register all versions of this name. Import it under "
            "another name, or ask its owner or an admin."
        )
    receiver = _Receiver(writer, read, foreign)
    receiver.add_backbones(contents, owner)
    received = [receiver.add_task(entry, ref, new) for entry, ref, new in plan]
    return received + [receiver.add_alias(alias, renames.get(alias.name, alias.name)) for alias in aliases]


def _is_owned(connection: Connection, name: str, owner: str) -> bool:
    """Whether all versions of a name were registered or imported by one user."""
    event = schema.event.c
    added = event.kind.in_(("registered", "imported")) & event.subject.startswith(f"{name}:", autoescape=True)
    return set(connection.scalars(select(event.created_by).where(added).distinct())) <= {owner}


def _plan(
    connection: Connection, entries: Sequence[Entry], renames: Mapping[str, str]
) -> list[tuple[Entry, str, bool]]:
    """Each task's reference in this registry, and whether it is new."""
    names = {entry.task.name for entry in entries}
    if unknown := sorted(renames.keys() - names):
        raise RegistryError(f"There is no task {unknown[0]!r} to rename. Tasks: {', '.join(sorted(names))}.")
    for name in renames.values():
        check_new_name(name)
    task, stored, active, conflicts = schema.task.c, {}, {}, []
    for name in sorted({renames.get(name, name) for name in names}):
        query = select(task.version, task.artifact, retired().label("retired")).where(task.name == name)
        for row in connection.execute(query.order_by(task.version)):
            stored[name, row.version] = row.artifact
            if not row.retired:
                active[name, row.artifact] = row.version
    plan = []
    for entry in entries:
        name, sha256 = renames.get(entry.task.name, entry.task.name), entry.task.artifact
        version = entry.task.version
        if stored.get((name, version)) != sha256:  # the same content may be here as another version
            version = active.get((name, sha256), version)
        stored_sha256 = stored.get((name, version))
        if stored_sha256 is not None and stored_sha256 != sha256:
            conflicts.append(f"'{name}:{version}' ({stored_sha256[:12]}… is not {sha256[:12]}…)")
        if stored_sha256 is None and name in RESERVED:
            raise RegistryError(f"The name {name!r} is reserved: {RESERVED[name]}. Rename it: --rename {name}=NEW.")
        stored[name, version] = stored_sha256 or sha256
        plan.append((entry, f"{name}:{version}", stored_sha256 is None))
    if conflicts:
        raise RegistryError(
            f"These versions exist with other content: {', '.join(conflicts)}. Nothing was changed; import the tasks "
            "under another name with --rename OLD=NEW (in Python: renames={OLD: NEW})."
        )
    return plan


_DAMAGED = "its stored bytes in this registry are DAMAGED and are not repaired; see: addenda verify --deep"


class _Receiver:
    """Imports from one source, in one transaction."""

    def __init__(self, writer: Writer, read: ReadBlob, foreign: Set[str]) -> None:
        self._writer, self._read, self._connection = writer, read, writer.connection
        self._foreign = foreign  # names of other owners, which are not changed
        self._rows: dict[tuple[str, int], Row[Any]] = {}  # by name and version in the source
        self._sizes: dict[str, tuple[int, int]] = {}  # width and depth of each backbone

    def add_backbones(self, contents: Contents, owner: str | None) -> None:
        """Adds new backbones. Their sizes cannot be verified, so users limited to their own names may not add any."""
        columns, used = schema.backbone.c, {entry.task.backbone for entry in contents.tasks}
        for row in self._connection.execute(select(columns.fingerprint, columns.embed_dim, columns.depth)):
            self._sizes[row.fingerprint] = row.embed_dim, row.depth
        for backbone in contents.backbones:
            if backbone.fingerprint not in used:
                raise IntegrityError(f"It contains backbone {backbone.name!r}, which none of its tasks uses.")
            if backbone.fingerprint not in self._sizes:
                if owner is not None:
                    raise OwnershipError(
                        f"Backbone {backbone.name!r} ({backbone.fingerprint[:12]}…) is not registered, and {owner} "
                        "may not add backbones. Ask an admin."
                    )
                self._writer.add(schema.backbone, vars(backbone), "backbone", backbone.fingerprint)
                self._sizes[backbone.fingerprint] = backbone.embed_dim, backbone.depth

    def add_task(self, entry: Entry, ref: str, new: bool) -> Received:
        """Adds a task, or adds missing golden probes and tags to an existing one."""
        details, generation, name = [], None, ref.partition(":")[0]
        with integrity_errors(f"Task {entry.ref!r} was not imported"):
            check_arrival(entry)
            if new:
                generation = self._insert(entry, name)
            row = self._rows[entry.task.name, entry.task.version] = find(self._connection, ref)
            if not new:
                try:
                    check_stored(self._connection, row._asdict(), {})
                except IntegrityError:
                    details.append(_DAMAGED)
                details += [] if name in self._foreign else self._add_goldens(entry, row)
        if name not in self._foreign:
            present = changes.tags_of(self._connection, row)
            for tag in (tag for tag in entry.tags if tag not in present):  # the database rejects duplicates
                changes.tag(self._writer, row, tag)
                details += [] if new else [f"tagged {tag!r}"]
        if entry.retirement is not None and new:
            stamp = {"created_by": entry.retirement.created_by, "created_at": entry.retirement.created_at}
            changes.retire(self._writer, row, entry.retirement.reason, stamp)
            details.append(f"retired: {entry.retirement.reason}")
        elif entry.retirement is not None and not is_retired(self._connection, row):  # it may be in use here
            details.append(f"retired in the source ({entry.retirement.reason}), active here")
        elif entry.retirement is None and is_retired(self._connection, row):
            details.append("active in the source, retired here")
        return Received(ref, entry.ref, "added" if new else "there already", "; ".join(details), generation)

    def add_alias(self, alias: BundledAlias, name: str) -> Received:
        """Sets an alias as in the source, unless it is in use here."""
        ref, origin = f"{name}@{alias.alias}", f"{alias.name}@{alias.alias}"
        row = self._rows[alias.name, alias.version]
        target, current = f"'{name}:{row.version}'", changes.alias_version(self._connection, name, alias.alias)
        if current == row.version:
            return Received(ref, origin, "there already")
        if current:
            return Received(ref, origin, "kept", f"points at '{name}:{current}' here, not at {target}")
        if is_retired(self._connection, row):
            return Received(ref, origin, "kept", f"not set, since {target} is retired here")
        generation = changes.set_alias(self._writer, row, alias.alias)
        return Received(ref, origin, "added", f"points at {target}", generation)

    def _insert(self, entry: Entry, name: str) -> int:
        """Checks and inserts a task; returns the event's id."""
        parents = []
        for parent in entry.parents:
            row = self._rows.get((parent.name, parent.version))
            if row is None or row.artifact != parent.sha256:
                raise IntegrityError(f"it extends '{parent.name}:{parent.version}', which does not come before it")
            parents.append(row)
        artifact = self._read(entry.task.artifact)
        task = self._check(entry.task, artifact, parents)
        return insert_task(
            self._writer,
            "imported",
            {**vars(entry.task), "name": name},
            artifact,
            [row.id for row in parents],
            [self._golden(task, golden) for golden in entry.goldens],
            self._statistics(entry),
            [vars(evaluation) for evaluation in entry.evaluations],
            origin=entry.ref,
        )

    def _check(self, row: TaskRow, artifact: bytes, parents: Sequence[Row[Any]]) -> Task:
        """Decodes an artifact; raises IntegrityError unless it fits its row, parents and backbone."""
        loaded = {task.sha256: task for task in load_tasks(self._connection, parents)}

        def parent(sha256: str) -> Task:
            if sha256 not in loaded:
                raise IntegrityError("its artifact has a parent that its row lacks")
            return loaded[sha256]

        task = decode(artifact, row.artifact, parent, row_fields(row))
        hashes = [parent.sha256 for parent in task.parents]
        if hashes != [row.artifact for row in parents] or any(parent.class_token is None for parent in task.parents):
            raise IntegrityError("its row and its artifact disagree on its parents, or a parent has no class token")
        try:
            expected = derived(task)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise IntegrityError(f"its metrics are not valid: {error}") from error
        if mismatches := [column for column, value in expected.items() if getattr(row, column) != value]:
            raise IntegrityError(f"its row does not match its artifact or metrics: {', '.join(mismatches)}")
        width, depth = self._sizes.get(row.backbone, (0, 0))
        if task.head_weight.shape[1] != width or (task.memory is not None and len(task.memory) != depth):
            raise IntegrityError("its tensors do not fit its backbone, or its backbone is missing")
        try:
            check_bounds(task)
        except RegistryError as error:
            raise IntegrityError(str(error)) from error
        return task

    def _statistics(self, entry: Entry) -> dict[str, Any] | None:
        if entry.statistics is None:
            return None
        data = self._read(entry.statistics)
        statistics = FeatureStatistics.decode(data, entry.statistics, len(entry.task.labels))
        width, _ = self._sizes[entry.task.backbone]
        if statistics.sample.shape[1] != width:
            raise IntegrityError(
                f"its statistics have {statistics.sample.shape[1]} dimensions, but its backbone has {width}"
            )
        if statistics.excess:
            raise IntegrityError(f"its {statistics.excess}")
        return {"sha256": entry.statistics, "data": data}

    def _golden(self, task: Task, golden: GoldenRow) -> dict[str, Any]:
        logits, num_labels = self._read(golden.digest), len(task.labels)
        if not logits or len(logits) % (4 * num_labels) or len(logits) > 4 * num_labels * MAX_PROBE_IMAGES:
            raise IntegrityError(
                f"its golden probe does not have {num_labels} logits for each of 1 to {MAX_PROBE_IMAGES} images"
            )
        values = torch.frombuffer(bytearray(logits), dtype=torch.float32).view(-1, num_labels)
        if not is_finite(values, task.objective, task.temperature):
            raise IntegrityError("its golden probe has logits or probabilities that are NaN or infinite")
        return {**vars(golden), "logits": logits}

    def _add_goldens(self, entry: Entry, row: Row[Any]) -> list[str]:
        """Adds golden probes under new numerics; returns messages, also if probes differ under the same numerics."""
        columns, messages = schema.golden.c, []
        query = select(columns.numerics_fingerprint, columns.digest).where(columns.task_id == row.id)
        stored = dict(self._connection.execute(query).all())
        for golden in entry.goldens:
            numerics = golden.numerics_fingerprint
            if numerics not in stored:
                add_golden(self._writer, row, self._golden(load_task(self._connection, row), golden))
                messages.append(f"golden probe added (numerics {numerics[:12]}…)")
            elif stored[numerics] != golden.digest:
                messages.append(f"golden probes DIFFER under the same numerics ({numerics[:12]}…); see: addenda verify")
        return messages
