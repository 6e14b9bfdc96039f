"""One forward pass for all tasks: shared-prefix attention, tiles, exactness, routing."""

from addenda.combined.features import TASK_FEATURE, feature_tasks, feature_widths
from addenda.combined.forward import Observer, attention_map, forward_pass, pausing, task_features
from addenda.combined.golden import Verdict, golden, verdicts, verify
from addenda.combined.model import CombinedModel, TaskLogits
from addenda.combined.numerics import numerics, numerics_fingerprint, tensor_digest
from addenda.combined.operations import TaskCost, loaded_bytes, pass_operations, task_cost
from addenda.combined.predictions import not_finite, predictions, predictions_of, task_groups
from addenda.combined.recorded import recorded_backbone
from addenda.combined.routing import Choice, Router, can_be_routed, feature_statistics, joined_statistics
from addenda.combined.selftest import prove
from addenda.combined.shapes import micro_batch
from addenda.combined.tiles import Layout, TileStore

__all__ = [
    "TASK_FEATURE",
    "Choice",
    "CombinedModel",
    "Layout",
    "Observer",
    "Router",
    "TaskCost",
    "TaskLogits",
    "TileStore",
    "Verdict",
    "attention_map",
    "can_be_routed",
    "feature_statistics",
    "feature_tasks",
    "feature_widths",
    "forward_pass",
    "golden",
    "joined_statistics",
    "loaded_bytes",
    "micro_batch",
    "not_finite",
    "numerics",
    "numerics_fingerprint",
    "pass_operations",
    "pausing",
    "predictions",
    "predictions_of",
    "prove",
    "recorded_backbone",
    "task_cost",
    "task_features",
    "task_groups",
    "tensor_digest",
    "verdicts",
    "verify",
]
