"""Peak memory of a computation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def peak_bytes(run: Callable[[], object], existing: Iterable[Tensor], device: torch.device) -> int:
    """Peak memory that `run` allocates in addition to the `existing` tensors.

    On a GPU this is the statistic of torch's allocator. The CPU allocator has none, so the outputs of every operation,
    forward and backward, are counted there from when their storage is first seen until it is freed. Memory that a
    kernel allocates and frees internally, such as a library's packing buffers, is not counted.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    counter = _LiveStorage(existing)
    with counter:
        run()
    return counter.peak


class _LiveStorage(TorchDispatchMode):
    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in existing}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._known:
            self._known.add(address)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._freed, address, size)
        return tensor

    def _freed(self, address: int, size: int) -> None:
        self._known.remove(address)
        self._live -= size
