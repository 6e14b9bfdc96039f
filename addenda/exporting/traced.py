"""The combined pass as a plain torch module, to be traced for any number of images."""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from addenda.backbones import FrozenBackbone
from addenda.combined import CombinedModel, task_features
from addenda.combined.probes import probe_images
from addenda.registry import Task


class TracedPass(nn.Module):
    """The frozen stream, the task streams and the heads: the code of the combined pass without its fixed shapes.

    Args:
        model: the tasks on their backbone, inexact: no slot of its tiles is empty.
    """

    def __init__(self, model: CombinedModel) -> None:
        super().__init__()
        self._backbone = _without_head(model.backbone)
        self.backbone = self._backbone.model  # registered, so that its weights are named in the file
        self._tasks, self._layout = model.tasks, model.layout
        self._reads_pooled = any(task.reads_pooled for task in model.tasks.values())

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B C"]]:
        """Logits of each task by name, from images as the backbone's transform gives them."""
        stream = self._backbone.stream(images, "pooled" if self._reads_pooled else "nothing")
        tiles = task_features(self._backbone, stream, self._layout)
        pooled = stream.pooled if self._reads_pooled else None
        answers = {}
        for name, task in self._tasks.items():
            feature = pooled
            if task.class_token is not None:
                tile, slot = self._layout.slot[task.sha256]
                feature = tiles[tile][slot]
            assert feature is not None
            answers[name] = _logits(task, feature, pooled)
        return answers


def trace(model: CombinedModel) -> torch.export.ExportedProgram:
    """Traces the pass of a model for any number of images."""
    images = probe_images(model.backbone)
    with torch.no_grad():
        return torch.export.export(
            TracedPass(model).eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
        )


def _logits(task: Task, feature: Tensor, pooled: Tensor | None) -> Float[Tensor, "B C"]:
    logits = F.linear(feature.float(), task.head_weight, task.head_bias)
    if task.pooled_weight is not None:
        assert pooled is not None
        logits = logits + F.linear(pooled.float(), task.pooled_weight)
    return logits


def _without_head(backbone: FrozenBackbone) -> FrozenBackbone:
    """The backbone without its own classifier, which no task reads; it shares everything else."""
    bare = copy(backbone)
    bare.model = copy(backbone.model)
    bare.model._modules = {**backbone.model._modules, "head": nn.Identity()}
    return bare
