"""Matrix products of few rows, whose bits are promised all the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

MIN_ROWS = 4
"""Fewest rows of a matrix product whose bits are promised: with one row it takes another path, with other bits."""


def product(rows: Float[Tensor, "*n B k"], matrices: Float[Tensor, "*n k w"]) -> Float[Tensor, "*n B w"]:
    """Rows by matrices, each with its own; a few rows are filled up to MIN_ROWS with zeros."""
    if torch.compiler.is_compiling():  # a traced pass takes any number of rows, and no bits are promised of it
        return rows @ matrices
    count = rows.shape[-2]
    filled = F.pad(rows, (0, 0, 0, max(0, MIN_ROWS - count)))
    products: Tensor = filled @ matrices
    return products[..., :count, :]
