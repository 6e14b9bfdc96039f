"""The model as a worker sees it: snapshots of tasks without weights, and a batcher that asks the model's process."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from addenda import exceptions
from addenda.backbones import FrozenBackbone, ImageInput
from addenda.combined import CombinedModel
from addenda.exceptions import AddendaError, OverloadedError
from addenda.registry import Task, TaskRecord
from addenda.serving.channel import Channel, Kind, Message
from addenda.serving.outputs import Outputs, Wanted, columns_of
from addenda.serving.service import Batcher, Limits, Service, decoders
from addenda.serving.shared import Quota
from addenda.serving.snapshot import Snapshot


class RemoteModel(NamedTuple):
    """What a worker knows of a combined model."""

    number: int  # of its snapshot
    tasks: dict[str, Task]  # without weights
    exact: bool
    micro_batch: int


class RemoteRecord(NamedTuple):
    """What a worker knows of a task's record: what tasks are selected by."""

    ref: str
    version: int
    tags: list[str]
    aliases: list[str]


class RemoteBatcher(Batcher):
    """Lets the model's process compute images, which it reads from shared memory."""

    def __init__(self, channel: Channel, pixels: Float[Tensor, "N 3 H W"], waiting: Quota) -> None:
        self.waiting, self.seconds_per_image = waiting, 0.01
        self._channel, self._pixels, self._numbers = channel, pixels, count()
        self._free = list(reversed(range(len(pixels))))  # the slot freed last is used first: memory grows with the load
        self._slots: dict[int, list[int]] = {}
        self._results: dict[int, asyncio.Future[Message]] = {}

    async def close(self) -> None:
        """Has nothing to stop."""

    @contextmanager
    def _pending(self, num_images: int) -> Iterator[None]:
        """Nothing runs in the background here."""
        yield

    async def predict(self, snapshot: Snapshot, images: Iterable[Float[Tensor, "3 H W"]], wanted: Wanted) -> Outputs:
        """Asks for the logits of tasks of one snapshot; cancelling the call removes its images from the queue."""
        names = wanted.names
        assert wanted == Wanted(names), "requests for features are relayed"
        pixels, model, number = list(images), cast(RemoteModel, snapshot.model), next(self._numbers) % 2**32
        if len(pixels) > len(self._free):  # those of cancelled requests are free once the model's process says so
            raise OverloadedError("The queue is full: cancelled images have not left it yet. Try again later.", 1)
        slots = self._slots[number] = [self._free.pop() for _ in pixels]
        for slot, image in zip(slots, pixels, strict=True):
            self._pixels[slot].copy_(image)
        tasks = None if names == tuple(model.tasks) else list(names)
        request = json.dumps({"slots": slots, "tasks": tasks})
        result = self._results[number] = asyncio.get_running_loop().create_future()
        self._channel.send(Message(Kind.PREDICT, number, model.number, request.encode()))
        try:
            message = await result
        finally:
            if not result.done() or result.cancelled():
                self._channel.send(Message(Kind.CANCEL, number))
        columns = columns_of(names, tuple(len(model.tasks[name].labels) for name in names))
        matrix = torch.zeros(len(pixels), 0, dtype=torch.float32, device="cpu")
        if message.payload:  # there is none if no task is served
            matrix = torch.frombuffer(bytearray(message.payload), dtype=torch.float32).view(len(pixels), -1)
        return Outputs(columns, matrix, model.exact)

    def receive(self, message: Message) -> None:
        """Completes the request of a reply, LOGITS or FAILED."""
        result = self._results.pop(message.number)
        self._free += reversed(self._slots.pop(message.number))
        if message.kind is Kind.LOGITS:
            self.seconds_per_image = message.value / 1e6
        if result.done():
            return
        if message.kind is Kind.LOGITS:
            result.set_result(message)
        else:
            result.set_exception(_error(*json.loads(message.payload)))


def _error(name: str, message: str) -> Exception:
    kind = getattr(exceptions, name, None)
    if isinstance(kind, type) and issubclass(kind, AddendaError):
        return kind.__new__(kind, message)
    return RuntimeError(f"The model's process failed: {name}: {message}")


class RemoteService(Service):
    """The service of a worker, without the parts that need the registry or weights: requests for those are relayed."""

    def __init__(self, backbone: ImageInput, batcher: RemoteBatcher, limits: Limits) -> None:
        self.backbone, self.batcher, self.limits = cast(FrozenBackbone, backbone), batcher, limits
        self.cache = None
        self._decoders = decoders()
        self._snapshot: Snapshot | None = None

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot served now."""
        assert self._snapshot is not None, "no request is accepted before the first snapshot"
        return self._snapshot

    def serve(self, message: Message, channel: Channel) -> None:
        """Serves the snapshot of a message; tells the model's process when no request uses it any more."""
        document: dict[str, Any] = json.loads(message.payload)
        known = {} if self._snapshot is None else self._snapshot.model.tasks
        tasks = {task.name: task for task in known.values()}
        tasks |= {fields["name"]: _task(fields) for fields in document["new"]}
        model = RemoteModel(
            message.value, {name: tasks[name] for name in document["tasks"]}, document["exact"], document["micro_batch"]
        )
        records = {name: cast(TaskRecord, RemoteRecord(*facts)) for name, facts in document["records"].items()}
        self._snapshot = Snapshot(
            document["generation"], cast(CombinedModel, model), records, document["quarantined"], {}
        )
        release = partial(_release, asyncio.get_running_loop(), channel, message.value)
        weakref.finalize(self._snapshot, release).atexit = False

    async def close(self) -> None:
        """Stops all threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)


def _release(loop: asyncio.AbstractEventLoop, channel: Channel, number: int) -> None:
    """Tells the model's process, unless this one is ending, that no request uses a snapshot any more."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(channel.send, Message(Kind.RELEASE, value=number))


def _task(fields: dict[str, Any]) -> Task:
    """A task without weights."""
    sha256, labels = fields.pop("sha256"), tuple(fields.pop("labels"))
    empty = torch.zeros(0, 0, dtype=torch.float32, device="cpu")
    task = Task(labels=labels, head_weight=empty, head_bias=empty[0:0].flatten(), **fields)
    vars(task)["sha256"] = sha256
    return task
