"""One frozen forward pass over one batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones.arithmetic import layer_statistics
from addenda.backbones.family import KeyValue, Reading

if TYPE_CHECKING:
    from addenda.backbones.frozen import FrozenBackbone


class FrozenStream:
    """One frozen forward pass over one batch. Iterate once, then read `pooled` and `layers`."""

    def __init__(self, backbone: FrozenBackbone, images: Tensor, reading: Reading, layers: bool) -> None:
        self._backbone = backbone
        self._images = images
        self._reading = reading
        self._tokens: Tensor | None = None
        self._layers: list[Tensor] | None = [] if layers else None
        self._stages: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[KeyValue]:
        """Yields each layer's keys and values, Float[B, H, P, d]; none without blocks for task tokens."""
        backbone = self._backbone
        if backbone.stages is not None:
            self._stages = backbone.stages(backbone.on_device(self._images), layers=self._layers is not None)
            return
        family, tokens = backbone.family, backbone.embed(self._images)
        for number, block in enumerate(backbone.blocks, 1):
            is_last = number == backbone.depth
            outputs = family.last(block, tokens, self._reading) if is_last else family.run(block, tokens)
            tokens, key_values, normed = outputs
            if number > 1 and self._layers is not None:  # of the block before, while its output is in the CPU's caches
                num_patches = backbone.model.patch_embed.num_patches
                self._layers.append(layer_statistics(normed, num_patches, backbone.has_class_token))
            if is_last and self._reading != "nothing":
                self._tokens = tokens
            yield key_values

    @property
    def layers(self) -> Float[Tensor, "B n"]:
        """The layer features of every block except the last, in float32 or higher."""
        assert self._layers is not None, "layer features were not requested"
        if self._stages is not None:
            return self._stages[1]
        assert len(self._layers) == self._backbone.depth - 1, "the stream was not read to its end"
        count = self._images.shape[0]  # not len(), which would fix the batch size of a traced model
        empty = torch.zeros(count, 0, dtype=torch.float32, device=self._backbone.device)
        return torch.cat(self._layers or [empty], dim=1)

    @property
    def tokens(self) -> Float[Tensor, "B P D"]:
        """The last block's output after the final norm, as returned by timm's forward_features."""
        assert self._tokens is not None, "the stream was not read to its end, or was made with reading='nothing'"
        normed: Tensor = self._backbone.model.norm(self._tokens)
        return normed

    @property
    def pooled(self) -> Float[Tensor, "B D"]:
        """The pooled feature, which the backbone's head reads."""
        if self._stages is not None:
            return self._stages[0]
        assert self._tokens is not None, "the stream was not read to its end, or was made with reading='nothing'"
        return self._backbone.pool(self._tokens, self._reading)
