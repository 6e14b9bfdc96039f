"""The task registry: records, artifacts, lineage and history.

Names that need torch are imported on first use, so that reading records does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from addenda.registry.audit.history import ComparedEvaluation, VersionDifference
from addenda.registry.registry import Registry
from addenda.registry.store.digests import canonical_json, digest
from addenda.registry.store.lineage import Kin, Lineage
from addenda.registry.store.names import LABELS, check_labels, check_name, check_new_name, check_tag
from addenda.registry.store.objectives import BASELINES, MEANINGS, baselines, headline
from addenda.registry.store.queries import TaskFilter, plain_name
from addenda.registry.store.records import Evaluation, EvaluationRecord, Event, TaskRecord
from addenda.registry.store.selection import select_tasks

if TYPE_CHECKING:
    from addenda.registry.audit.faults import Fault
    from addenda.registry.audit.integrity import Integrity
    from addenda.registry.exchange.backup import restore
    from addenda.registry.exchange.receiver import Received
    from addenda.registry.store.artifact import ADAPTED, LowRank
    from addenda.registry.store.task import Golden, Task, check_unwritten, is_finite, probabilities
    from addenda.registry.store.task_reader import FeatureStatistics

_NAMES = {
    "audit.integrity": ("Fault", "Integrity"),
    "exchange.backup": ("restore",),
    "exchange.receiver": ("Received",),
    "store.artifact": ("ADAPTED", "LowRank"),
    "store.task_reader": ("FeatureStatistics",),
    "store.task": ("Golden", "Task", "check_unwritten", "is_finite", "probabilities"),
}
__all__ = [
    "ADAPTED",
    "BASELINES",
    "LABELS",
    "MEANINGS",
    "ComparedEvaluation",
    "Evaluation",
    "EvaluationRecord",
    "Event",
    "Fault",
    "FeatureStatistics",
    "Golden",
    "Integrity",
    "Kin",
    "Lineage",
    "LowRank",
    "Received",
    "Registry",
    "Task",
    "TaskFilter",
    "TaskRecord",
    "VersionDifference",
    "baselines",
    "canonical_json",
    "check_labels",
    "check_name",
    "check_new_name",
    "check_tag",
    "check_unwritten",
    "digest",
    "headline",
    "is_finite",
    "plain_name",
    "probabilities",
    "restore",
    "select_tasks",
]


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"addenda.registry.{module}"), name)
    raise AttributeError(f"module 'addenda.registry' has no attribute {name!r}")
