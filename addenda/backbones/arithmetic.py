"""Arithmetic as the fixed shapes need it, whatever context the caller's own code runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar, cast

import torch

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
