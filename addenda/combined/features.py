"""Names of the features that `CombinedModel.embed` returns."""

from __future__ import annotations

from collections.abc import Sequence

from addenda.backbones import FrozenBackbone
from addenda.exceptions import BackboneError, DataError

TASK_FEATURE = "task:"
"""Before a task's name: the feature that its head reads."""


def feature_widths(backbone: FrozenBackbone) -> dict[str, int]:
    """The backbone's own features and their numbers of dimensions; a task's feature is as wide as the pooled one."""
    layers = backbone.num_layer_features
    return {"pooled": backbone.embed_dim} | ({"layers": layers} if layers else {})


def feature_tasks(features: Sequence[str], backbone: FrozenBackbone) -> list[str]:
    """The names of the tasks in names of features; raises an error if a feature is unknown, or none is named."""
    if not features:
        raise DataError("No feature is named. Name 'pooled', 'layers' or 'task:NAME'.")
    if "layers" in features and not backbone.num_layer_features:
        raise BackboneError(f"Backbone {backbone.name!r} has no layer features. Name 'pooled' or 'task:NAME'.")
    for name in features:
        if name not in ("pooled", "layers") and not name.startswith(TASK_FEATURE):
            raise DataError(f"There is no feature {name[:100]!r}. Name 'pooled', 'layers' or 'task:NAME'.")
    return [name.removeprefix(TASK_FEATURE) for name in features if name.startswith(TASK_FEATURE)]
