"""The database of tasks: records, artifacts, lineage, history."""

from addenda.registry.artifact import canonical_json, digest
from addenda.registry.objectives import OBJECTIVES, headline, probabilities
from addenda.registry.records import EvaluationRecord, TaskRecord
from addenda.registry.registry import Registry
from addenda.registry.statistics import FeatureStatistics
from addenda.registry.task import ADAPTED, Golden, LowRank, Task, check_name

__all__ = [
    "ADAPTED",
    "OBJECTIVES",
    "EvaluationRecord",
    "FeatureStatistics",
    "Golden",
    "LowRank",
    "Registry",
    "Task",
    "TaskRecord",
    "canonical_json",
    "check_name",
    "digest",
    "headline",
    "probabilities",
]
