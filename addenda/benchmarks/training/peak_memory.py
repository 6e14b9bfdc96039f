"""The most bytes of tensors that live at once while something runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def peak_bytes(run: Callable[[], object], there: Iterable[Tensor], device: torch.device) -> int:
    """Peak of what `run` allocates above what is there already.

    On a GPU it is what torch's allocator says. A processor's has no such counter, so every operation's outputs are
    counted there, forward and backward, from when their storage is first seen until it is freed. What a kernel
    allocates and frees within itself is not seen; a library's packing buffers are such.

    Args:
        run: what to measure.
        there: tensors of which `run` may make views; on a processor they are told from new ones by this.
        device: where it computes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    counter = _LiveStorage(there)
    with counter:
        run()
    return counter.peak


class _LiveStorage(TorchDispatchMode):
    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in there}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if size and place not in self._known:
            self._known.add(place)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, place, size)
        return tensor

    def _forget(self, place: int, size: int) -> None:
        self._known.remove(place)
        self._live -= size
