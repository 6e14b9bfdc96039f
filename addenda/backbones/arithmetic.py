"""Arithmetic with fixed shapes and modes, whatever torch contexts the caller has set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., object])


def uncompiled(function: Function) -> Function:
    """Excludes a function from torch.compile: a compiled forward pass gives different bits."""
    return cast(Function, torch.compiler.disable(function))


_TRACED: ContextVar[bool] = ContextVar("traced", default=False)


@contextmanager
def traced() -> Iterator[None]:
    """Marks this thread as tracing for export: any number of rows, no promise about bits.

    `torch.compiler.is_compiling` would not do: it is also true while any other thread compiles.
    """
    token = _TRACED.set(True)
    try:
        yield
    finally:
        _TRACED.reset(token)


def is_traced() -> bool:
    """Whether this thread traces for export."""
    return _TRACED.get()


@contextmanager
def plain(device: torch.device, grad: bool = False) -> Iterator[None]:
    """Disables autocast, inference mode and any default device that the caller has set.

    Args:
        device: device of the computation; autocast is disabled there and on the CPU.
        grad: whether gradients are recorded.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind in {"cpu", device.type} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # timm creates tensors on the default device
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def float32_on_cpu() -> Iterator[None]:
    """Makes float32 and the CPU the defaults while modules are built.

    The default dtype is process-wide: other threads also see float32 meanwhile.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), plain(torch.device("cpu")):
            yield
    finally:
        torch.set_default_dtype(before)


MIN_ROWS = 4
"""Minimum rows of a matrix product with reproducible bits: one row takes another code path, with different bits."""


def product(rows: Float[Tensor, "*n B k"], matrices: Float[Tensor, "*n k w"]) -> Float[Tensor, "*n B w"]:
    """Batched matrix product; fewer than MIN_ROWS rows are padded with zeros."""
    if is_traced() or (count := rows.shape[-2]) >= MIN_ROWS:
        return rows @ matrices
    products: Tensor = F.pad(rows, (0, 0, 0, MIN_ROWS - count)) @ matrices
    return products[..., :count, :]


def layer_statistics(normed: Float[Tensor, "B P D"], num_patches: int, class_token: bool) -> Float[Tensor, "B n"]:
    """Layer features of one block: its class token, if any, and the mean and standard deviation over its patches.

    `normed` is the block's output after the next block's first norm. The variance takes two passes, in float32 or
    higher: E[x^2] - E[x]^2 cancels where patches hardly differ, and torch's `var_mean` is far slower over this axis
    (docs/performance.md).
    """
    tokens = normed.to(torch.promote_types(normed.dtype, torch.float32))
    patches = tokens[:, -num_patches:]
    mean = patches.mean(1)
    deviation = (patches - mean.unsqueeze(1)).square().mean(1).sqrt()
    return torch.cat([*([tokens[:, 0]] if class_token else []), mean, deviation], dim=1)


class Adapter(NamedTuple):
    """Low-rank updates of one linear layer for S slots: f(x) becomes f(x) + (x @ down.T) @ up.T."""

    down: Float[Tensor, "S r in"]
    up: Float[Tensor, "S out r"]

    def __call__(self, inputs: Float[Tensor, "S B in"]) -> Float[Tensor, "S B out"]:
        """Returns the update of the layer's output, in the inputs' dtype."""
        return product(product(inputs, self.down.mT), self.up.mT)


class BlockAdapters(NamedTuple):
    """Low-rank updates of one block's linear layers, by timm's names.

    `q` is the query rows of timm's `qkv`; in a gated MLP, `fc1` is the layers of gate and value, as timm joins them.

    Each slot's updates apply to its own token only. All keys and values come from the backbone's unmodified `qkv`.
    """

    q: Adapter
    proj: Adapter
    fc1: Adapter
    fc2: Adapter
