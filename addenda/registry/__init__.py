"""The database of tasks: records, artifacts, lineage, history."""

from addenda.registry.artifact import canonical_json, check_unwritten, digest
from addenda.registry.backup import restore
from addenda.registry.bounds import is_finite
from addenda.registry.comparison import Difference
from addenda.registry.faults import Fault
from addenda.registry.history import Scored
from addenda.registry.integrity import Integrity
from addenda.registry.ledger import Event
from addenda.registry.lineage import Kin, Lineage
from addenda.registry.objectives import OBJECTIVES, headline, probabilities
from addenda.registry.queries import TaskFilter
from addenda.registry.receiving import Received
from addenda.registry.records import EvaluationRecord, Scoring, TaskRecord
from addenda.registry.registry import Registry
from addenda.registry.statistics import FeatureStatistics
from addenda.registry.task import ADAPTED, Golden, LowRank, Task, check_name, check_new_name

__all__ = [
    "ADAPTED",
    "OBJECTIVES",
    "Difference",
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
    "Scored",
    "Scoring",
    "Task",
    "TaskFilter",
    "TaskRecord",
    "canonical_json",
    "check_name",
    "check_new_name",
    "check_unwritten",
    "digest",
    "headline",
    "is_finite",
    "probabilities",
    "restore",
]
