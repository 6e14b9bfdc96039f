"""A worker's model beside the model's process, both in this process: logits, cancelled requests, errors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
import torch

from addenda import FrozenBackbone, Registry, Task
from addenda.exceptions import AddendaError, OverloadedError
from addenda.serving.channel import Channel, Kind, Message
from addenda.serving.link import Link
from addenda.serving.model_thread import ModelThread
from addenda.serving.outputs import Outputs, Wanted
from addenda.serving.remote import RemoteBatcher, RemoteService
from addenda.serving.service import Batcher, Limits
from addenda.serving.shared import Quota, pixel_bytes, pixel_slots, shared_memory
from addenda.serving.snapshot import Snapshot, empty_snapshot, next_snapshot

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SLOTS = 4


class Both(NamedTuple):
    """Both ends of a channel: the worker's batcher and service, the model's batcher and snapshot."""

    remote: RemoteBatcher
    service: RemoteService
    local: Batcher
    snapshot: Snapshot

    async def predict(self, count: int = 3, *names: str) -> Outputs:
        """What the worker gets for the first images."""
        return await self.remote.predict(self.service.snapshot, IMAGES[:count], Wanted(names or ("digits", "strokes")))


@pytest.fixture
def snapshot(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Snapshot:
    registered("digits")
    registered("strokes", seed=1)
    return next_snapshot(empty_snapshot(tiny), registry)


@asynccontextmanager
async def connected(snapshot: Snapshot) -> AsyncIterator[Both]:
    """A worker that serves a snapshot."""
    (one, other), (relayed, its_relayed) = socket.socketpair(), socket.socketpair()
    memory = shared_memory(pixel_bytes(SLOTS, IMAGES.shape[1:]))
    local, channel = Batcher(SLOTS, ModelThread()), await Channel.over(other)
    link = Link(
        1, await Channel.over(one), relayed, pixel_slots(memory, IMAGES.shape[1:]), local, lambda: (7, snapshot),
        lambda *request: None, lambda connection: None,
    )  # fmt: skip
    remote = RemoteBatcher(channel, pixel_slots(memory, IMAGES.shape[1:]), Quota(SLOTS))
    service = RemoteService(snapshot.model.backbone, remote, Limits())
    channel.send(Message(Kind.HELLO, 1))

    async def read() -> None:
        while (message := await channel.receive()) is not None:
            if message.kind is Kind.SNAPSHOT:
                service.serve(message, channel)
                channel.send(Message(Kind.SERVING, value=message.value))
            else:
                remote.receive(message)

    reading = asyncio.ensure_future(read())
    await link.serving
    try:
        yield Both(remote, service, local, snapshot)
    finally:
        channel.close()
        await asyncio.gather(link.ended, reading)
        await local.close()
        await service.close()
        its_relayed.close()


def test_a_worker_gets_the_logits_of_the_model_bit_for_bit(snapshot: Snapshot) -> None:
    async def run() -> None:
        async with connected(snapshot) as both:
            expected = snapshot.model(IMAGES)
            got = await both.predict()
            assert all(torch.equal(got[name], expected[name]) for name in expected)
            assert torch.equal((await both.predict(1, "strokes"))["strokes"], expected["strokes"][:1])

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (AddendaError("These images are odd."), AddendaError, "These images are odd."),
        (ValueError("what"), RuntimeError, "The model's process failed: ValueError: what"),
    ],
)
def test_an_error_of_the_model_reaches_the_request(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception], message: str
) -> None:
    async def fail(*arguments: object) -> Outputs:
        raise error

    async def run() -> None:
        async with connected(snapshot) as both:
            monkeypatch.setattr(both.local, "predict", fail)
            with pytest.raises(expected) as raised:
                await both.predict()
            assert str(raised.value) == message

    asyncio.run(run())


def test_slots_of_a_cancelled_request_are_free_once_the_model_says_so(snapshot: Snapshot) -> None:
    async def run() -> None:
        async with connected(snapshot) as both:
            request = asyncio.ensure_future(both.predict())
            await asyncio.sleep(0)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            with pytest.raises(OverloadedError, match="cancelled images have not left it yet"):
                await both.predict()
            while len(both.remote._free) < SLOTS:
                await asyncio.sleep(0.01)
            assert (await both.predict()).exact

    asyncio.run(run())


def test_a_worker_knows_tasks_without_weights(snapshot: Snapshot) -> None:
    async def run() -> None:
        async with connected(snapshot) as both:
            for name, task in both.service.snapshot.model.tasks.items():
                original = snapshot.model.tasks[name]
                assert (task.ref, task.sha256, task.labels) == (original.ref, original.sha256, original.labels)
                assert task.memory is None
                assert not task.head_weight.numel()
            assert [*both.service.snapshot.records] == ["digits", "strokes"]

    asyncio.run(run())
