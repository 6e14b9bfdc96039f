"""Arithmetic as the fixed shapes need it, whatever context the caller's own code runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., object])


def uncompiled(function: Function) -> Function:
    """Keeps a function out of whatever its caller compiles: compiled, a forward pass has other bits."""
    return cast(Function, torch.compiler.disable(function))


@contextmanager
def plain(device: torch.device, grad: bool = False) -> Iterator[None]:
    """Computes without autocast, inference mode or another default device, which a caller may have turned on.

    Args:
        device: where the work is done; autocast is off there and on the CPU.
        grad: whether gradients are recorded.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # timm's own code makes tensors there
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def building() -> Iterator[None]:
    """Builds modules in float32 on the CPU, whatever torch's default dtype and device are.

    The default dtype belongs to the whole process: threads that make tensors meanwhile see float32 too.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), plain(torch.device("cpu")):
            yield
    finally:
        torch.set_default_dtype(before)


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


def layer_statistics(normed: Float[Tensor, "B P D"], num_patches: int) -> Float[Tensor, "B n"]:
    """What a block's output says of an image: its class token, and mean and standard deviation over the patches.

    Tokens are read as the next block's first norm gives them. Deviations are taken from the mean in a second pass: the
    mean of squares less the squared mean cancels where patches hardly differ, and torch's `var_mean` over this axis
    takes far longer (docs/performance.md). In float32 at least; n is 3 D.
    """
    tokens = normed.to(torch.promote_types(normed.dtype, torch.float32))
    patches = tokens[:, -num_patches:]
    mean = patches.mean(1)
    deviation = (patches - mean.unsqueeze(1)).square().mean(1).sqrt()
    return torch.cat([tokens[:, 0], mean, deviation], dim=1)


class Adapter(NamedTuple):
    """Updates of one linear layer for S slots: its f(x) becomes f(x) + (x @ down.T) @ up.T."""

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
