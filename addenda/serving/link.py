"""A worker as the process of the model sees it: it gets snapshots, and logits for the images it has prepared."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from addenda.serving.channel import Channel, Kind, Message
from addenda.serving.outputs import Outputs, Wanted
from addenda.serving.service import Batcher
from addenda.serving.snapshot import Snapshot

TASK_FIELDS = ("name", "version", "sha256", "backbone", "labels", "objective", "temperature")
"""What a worker knows of a task."""

NumberedSnapshot = tuple[int, Snapshot]


class Link:
    """A worker that has been started. Create and use it on the event loop."""

    def __init__(
        self,
        number: int,
        channel: Channel,
        relayed: socket.socket,  # passes connections, on which it relays requests
        pixels: Float[Tensor, "N 3 H W"],  # shared memory, in which it leaves images
        batcher: Batcher,  # computes their logits
        newest: Callable[[], NumberedSnapshot],  # the snapshot to serve first
        count: Callable[[str, str, int, float], None],  # records a request in the metrics
        serve_connection: Callable[[socket.socket], None],  # serves a relayed request
    ) -> None:
        self.number = number
        self._channel, self._relayed, self._pixels, self._batcher = channel, relayed, pixels, batcher
        self._newest, self._count, self._serve_connection = newest, count, serve_connection
        self._used: dict[int, Snapshot] = {}  # snapshots that requests of the worker may name
        self._refs: set[tuple[str, str]] = set()  # tasks that it knows
        self._shown: dict[int, asyncio.Future[None]] = {}
        self._answers: dict[int, asyncio.Task[Outputs]] = {}
        self.pid: int | None = None  # until it has started
        self._loop = asyncio.get_running_loop()
        self.serving = self._loop.create_future()  # done once it serves its first snapshot, or has ended
        relayed.setblocking(False)
        self._loop.add_reader(relayed, self._accept)
        self.ended = asyncio.ensure_future(self._run())

    @property
    def responds(self) -> bool:
        """Whether it has started and not ended."""
        return self.pid is not None and not self.ended.done()

    def show(self, number: int, snapshot: Snapshot) -> asyncio.Future[None]:
        """Makes the worker serve a snapshot; the result is done once it does, or has ended."""
        self._used[number] = snapshot
        tasks = {(task.ref, task.sha256): task for task in snapshot.model.tasks.values()}
        new = [
            {name: getattr(task, name) for name in TASK_FIELDS} for key, task in tasks.items() if key not in self._refs
        ]
        self._refs = set(tasks)
        document = {
            "generation": snapshot.generation,
            "tasks": list(snapshot.model.tasks),
            "records": {
                name: (record.ref, record.version, list(record.tags), list(record.aliases))
                for name, record in snapshot.records.items()
            },
            "new": new,
            "quarantined": snapshot.quarantined,
            "exact": snapshot.model.exact,
            "micro_batch": snapshot.model.micro_batch,
        }
        self._channel.send(Message(Kind.SNAPSHOT, value=number, payload=json.dumps(document).encode()))
        shown = self._shown[number] = self._loop.create_future()
        return shown

    def stop(self) -> None:
        """Makes the worker complete its requests and end."""
        self._channel.send(Message(Kind.STOP))

    def kill(self) -> None:
        """Ends the worker at once."""
        if self.pid is not None and not self.ended.done():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._channel.close()

    def _accept(self) -> None:
        """Serves a connection on which the worker relays a request."""
        with suppress(BlockingIOError, ConnectionError):
            _, descriptors, _, _ = socket.recv_fds(self._relayed, 1, 1)
            for descriptor in descriptors:
                self._serve_connection(socket.socket(fileno=descriptor))
            if not descriptors:
                self._loop.remove_reader(self._relayed)

    async def _run(self) -> None:
        try:
            while (message := await self._channel.receive()) is not None:
                self._handle(message)
        finally:
            self._loop.remove_reader(self._relayed)
            self._relayed.close()
            self._channel.close()
            for answer in self._answers.values():
                answer.cancel()
            for waiting in (self.serving, *self._shown.values()):
                if not waiting.done():
                    waiting.set_result(None)
            self._used.clear()

    def _handle(self, message: Message) -> None:
        match message.kind:
            case Kind.PREDICT:
                answer = asyncio.ensure_future(self._predict(message))
                self._answers[message.number] = answer
                answer.add_done_callback(partial(self._reply, message.number))
            case Kind.CANCEL:
                if message.number in self._answers:
                    self._answers[message.number].cancel()
            case Kind.COUNT:
                self._count(*json.loads(message.payload))
            case Kind.RELEASE:
                del self._used[message.value]
            case Kind.SERVING:
                self._shown.pop(message.value).set_result(None)
                if not self.serving.done():
                    self.serving.set_result(None)
            case Kind.HELLO:
                self.pid = message.number
                self.show(*self._newest())

    async def _predict(self, message: Message) -> Outputs:
        request: dict[str, Any] = json.loads(message.payload)
        snapshot = self._used[message.value]
        names = list(snapshot.model.tasks) if request["tasks"] is None else request["tasks"]
        images = [self._pixels[slot] for slot in request["slots"]]
        return await self._batcher.predict(snapshot, images, Wanted(tuple(names)))

    def _reply(self, number: int, answer: asyncio.Task[Outputs]) -> None:
        """Sends logits or an error; even a cancelled request gets its reply, which makes its slots free again."""
        del self._answers[number]
        error = asyncio.CancelledError() if answer.cancelled() else answer.exception()
        if error is not None:
            document = [type(error).__name__, str(error)]
            self._channel.send(Message(Kind.FAILED, number, payload=json.dumps(document).encode()))
            return
        rows = answer.result().matrix.numpy().tobytes()
        self._channel.send(Message(Kind.LOGITS, number, int(1e6 * self._batcher.seconds_per_image), rows))
