"""One pass for all tasks: shared-prefix attention, tiles, exactness."""

from addenda.combined.cost import TaskCost, loaded_bytes, pass_operations, task_cost
from addenda.combined.golden import Verdict, golden, verify
from addenda.combined.layout import TileStore
from addenda.combined.model import Answers, CombinedModel
from addenda.combined.numerics import numerics, numerics_fingerprint, tensor_digest
from addenda.combined.predictions import predictions

__all__ = [
    "Answers",
    "CombinedModel",
    "TaskCost",
    "TileStore",
    "Verdict",
    "golden",
    "loaded_bytes",
    "numerics",
    "numerics_fingerprint",
    "pass_operations",
    "predictions",
    "task_cost",
    "tensor_digest",
    "verify",
]
