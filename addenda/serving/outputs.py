"""Outputs of many tasks for some images, side by side in one matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Wanted(NamedTuple):
    """What is to be computed for images."""

    names: tuple[str, ...]  # of tasks, for their logits, or of features
    features: bool = False  # the backbone's features for a router, too
    embed: bool = False  # features instead of logits


class Outputs(Mapping[str, Tensor]):
    """Tensors Float[B, n] by name, the columns of one matrix: a thousand are split, joined and checked at once.

    `columns` has each name's columns; `exact` is whether the exactness promise holds; `features` has the backbone's
    features for a router, if they were requested.
    """

    def __init__(
        self,
        columns: Mapping[str, slice],
        matrix: Float[Tensor, "B N"],
        exact: bool,
        features: Float[Tensor, "B F"] | None = None,
    ) -> None:
        self.columns, self.matrix, self.exact, self.features = columns, matrix, exact, features
        self.cached: bool | None = None  # whether no image was computed; None without a cache

    @classmethod
    def of(cls, num_images: int, tensors: Mapping[str, Tensor], exact: bool, features: Tensor | None = None) -> Outputs:
        """Puts a model's outputs for some images side by side, on the CPU."""
        columns = columns_of(tuple(tensors), tuple(tensor.shape[1] for tensor in tensors.values()))
        empty = torch.zeros(num_images, 0, dtype=torch.float32, device="cpu")
        matrix = torch.cat([*tensors.values()], dim=1).cpu() if tensors else empty
        features = None if features is None else features.cpu()
        return cls(columns, matrix, exact, features)

    def split(self, sizes: list[int]) -> list[Outputs]:
        """Divides the images."""
        features = [None] * len(sizes) if self.features is None else self.features.split(sizes)
        matrices = self.matrix.split(sizes)
        return [Outputs(self.columns, rows, self.exact, own) for rows, own in zip(matrices, features, strict=True)]

    def select(self, wanted: Wanted) -> Outputs:
        """Some of the outputs, in this order, and the features or not."""
        names, kept = wanted.names, self.features if wanted.features else None
        if names == tuple(self.columns):
            return Outputs(self.columns, self.matrix, self.exact, kept)
        return Outputs.of(len(self.matrix), {name: self[name] for name in names}, self.exact, kept)

    @property
    def headers(self) -> dict[str, str]:
        """The response header that says whether these outputs were cached."""
        return {} if self.cached is None else {"X-Cache": "hit" if self.cached else "miss"}

    def __getitem__(self, name: str) -> Tensor:
        return self.matrix[:, self.columns[name]].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


@lru_cache(maxsize=64)
def columns_of(names: tuple[str, ...], widths: tuple[int, ...]) -> Mapping[str, slice]:
    """The columns of outputs with these widths."""
    slices = (slice(end - width, end) for width, end in zip(widths, accumulate(widths), strict=True))
    return MappingProxyType(dict(zip(names, slices, strict=True)))


def joined(parts: Sequence[Outputs]) -> Outputs:
    """The outputs of consecutive images, one after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    features = [part.features for part in parts if part.features is not None]
    matrix = torch.cat([part.matrix for part in parts])
    return Outputs(first.columns, matrix, first.exact, torch.cat(features) if features else None)
