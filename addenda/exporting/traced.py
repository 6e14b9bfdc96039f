"""The combined pass as a plain torch module, to be traced for any number of images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from addenda.combined import CombinedModel, forward_pass
from addenda.combined.probes import probe_images


class TracedPass(nn.Module):
    """The combined pass without its fixed shapes.

    Args:
        model: the tasks on their backbone, inexact: no slot of its tiles is empty.
    """

    def __init__(self, model: CombinedModel) -> None:
        super().__init__()
        self._backbone = model.backbone.without_head()
        self.backbone = self._backbone.weights  # registered, so that they are named in the file
        self._contents = {name: task.sha256 for name, task in model.tasks.items()}
        self._layout = model.layout
        self._heads = dict(zip(self._contents.values(), model.heads, strict=True))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B C"]]:
        """Logits of each task by name, from images as the backbone's transform gives them."""
        answers = forward_pass(self._backbone, images, self._layout, self._heads).answers
        # Two names may have one content: each is an output of its own.
        return {name: answers[sha256].clone() for name, sha256 in self._contents.items()}


def trace(model: CombinedModel) -> torch.export.ExportedProgram:
    """Traces the pass of a model for any number of images."""
    images = probe_images(model.backbone)
    with torch.no_grad():
        return torch.export.export(
            TracedPass(model).eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
        )
