"""A cache of outputs by content: what was computed before for the same image, artifacts and numerics."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence

from torch import Tensor

from addenda.combined import TASK_FEATURE, feature_widths
from addenda.serving.outputs import Outputs, Wanted, columns_of, joined
from addenda.serving.snapshot import Snapshot

ENTRY_BYTES = 1500
"""Memory of an entry beside its numbers: its key, its tensors and their places in the cache."""

Entry = tuple[Tensor, Tensor | None]


def content_keys(images: Sequence[bytes], snapshot: Snapshot, wanted: Wanted) -> list[bytes]:
    """For each image, the digest of all that its outputs depend on; raises an error if the model may not compute now.

    The model checks settings and weights here as it does for a forward pass, so no entry is used after they change.
    """
    model = snapshot.model
    model.check_settings(threads=False)
    parts = [snapshot.numerics_fingerprint, model.backbone.fingerprint, repr(wanted[1:])]
    for name in wanted.names:
        task = model.tasks.get(name.removeprefix(TASK_FEATURE) if wanted.embed else name)
        own = wanted.embed and not name.startswith(TASK_FEATURE)
        parts.append(name if task is None or own else ",".join(each.sha256 for each in (*task.closure, task)))
    common = "\n".join(parts).encode()
    return [hashlib.sha256(common + hashlib.sha256(image).digest()).digest() for image in images]


def widths_of(snapshot: Snapshot, wanted: Wanted) -> dict[str, int]:
    """The number of logits of some tasks, or the widths of features."""
    if not wanted.embed:
        return {name: len(snapshot.model.tasks[name].labels) for name in wanted.names}
    own = feature_widths(snapshot.model.backbone)
    return {name: own.get(name, own["pooled"]) for name in wanted.names}


class ContentCache:
    """Outputs by key, in bounded memory; the least recently used are evicted first. Use it on one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.size_bytes = max_bytes, 0
        self.report: Callable[[bool], object] = lambda hit: None  # called for each image
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    async def outputs(
        self, keys: Sequence[bytes], widths: Mapping[str, int], compute: Callable[[Sequence[int]], Awaitable[Outputs]]
    ) -> Outputs:
        """The outputs of the images with these keys; `compute` computes those that are not cached, by number."""
        columns = columns_of(tuple(widths), tuple(widths.values()))
        found: dict[int, Outputs] = {}
        for number, key in enumerate(keys):
            if (entry := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
                found[number] = Outputs(columns, entry[0], True, entry[1])
            self.report(entry is not None)
        if missing := [number for number in range(len(keys)) if number not in found]:
            computed = (await compute(missing)).split([1] * len(missing))
            found |= zip(missing, computed, strict=True)
            for number, outputs in zip(missing, computed, strict=True):
                self._put(keys[number], outputs)
        whole = joined([found[number] for number in range(len(keys))])
        whole.cached = not missing
        return whole

    def _put(self, key: bytes, outputs: Outputs) -> None:
        # Copies: a row of a batch would keep the whole batch in memory.
        entry = outputs.matrix.clone(), None if outputs.features is None else outputs.features.clone()
        if key in self._entries or not outputs.exact:
            return
        self._entries[key] = entry
        self.size_bytes += _size(entry)
        while self.size_bytes > self.max_bytes:
            self.size_bytes -= _size(self._entries.popitem(last=False)[1])


def _size(entry: Entry) -> int:
    return ENTRY_BYTES + sum(tensor.nbytes for tensor in entry if tensor is not None)
