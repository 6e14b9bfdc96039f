"""Low-rank updates of a block's linear layers, each slot's own."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from addenda.backbones.products import product


class Adapter(NamedTuple):
    """Updates of one linear layer for S slots: its f(x) becomes f(x) + (x @ down.T) @ up.T.

    Attributes:
        down: Float[S, r, in].
        up: Float[S, out, r].
    """

    down: Float[Tensor, "S r in"]
    up: Float[Tensor, "S out r"]

    def __call__(self, inputs: Float[Tensor, "S B in"]) -> Float[Tensor, "S B out"]:
        """What it adds to the layer's output, in the inputs' dtype."""
        return product(product(inputs, self.down.mT), self.up.mT)


class BlockAdapters(NamedTuple):
    """Updates of the linear layers of one block, by timm's names; `q` is the queries' part of timm's `qkv`.

    They act on the tokens of their slots alone. Keys and values, those of the slot's own token too, come from the
    backbone's own `qkv`.
    """

    q: Adapter
    proj: Adapter
    fc1: Adapter
    fc2: Adapter
