"""Background work gives way to requests, and never runs the model at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
import torch

from addenda import FrozenBackbone, Registry, Task
from addenda.combined import CombinedModel
from addenda.combined.probe_inputs import probe_images
from addenda.serving import turns as module
from addenda.serving.service import Service
from addenda.serving.turns import Turns
from tests.serving.test_service import images_of


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_background_work_waits_while_images_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 60)
    turns, slices = Turns(), []

    def work() -> None:
        with turns.background() as give_way:
            for number in range(3):
                slices.append(number)
                if number == 1:
                    turns.report(1)  # a request arrives
                give_way()

    turns.report(1)
    thread = in_thread(work)
    thread.join(0.2)
    assert slices == []
    turns.report(0)
    while len(slices) < 2:
        threading.Event().wait(0.01)
    thread.join(0.2)
    assert slices == [0, 1]
    with turns.request():
        pass
    turns.report(0)
    thread.join(60)
    assert slices == [0, 1, 2]


def test_slices_alternate_with_forward_passes_and_neither_waits_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.6)  # far longer than a busy machine stops a thread
    turns, running, order = Turns(), threading.Lock(), []

    def run(kind: str) -> None:
        assert running.acquire(blocking=False), "two threads run the model"
        order.append(kind)
        threading.Event().wait(0.01)
        running.release()

    def work() -> None:
        with turns.background() as give_way:
            for _ in range(5):
                run("slice")
                give_way()

    turns.report(1)  # all the time
    thread = in_thread(work)
    while thread.is_alive() and len(order) < 10_000:
        with turns.request():
            run("pass")
        threading.Event().wait(0.001)  # as the event loop prepares the next batch
    assert order.count("slice") == 5
    assert order.count("pass") >= 5
    longest = max(len(part) for part in "".join(kind[0] for kind in order).replace("p", " ").split())
    assert longest <= 2


def test_a_failed_slice_ends_its_turn() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="slice"), turns.background():
        raise ValueError("slice")
    with turns.request():
        pass


def test_a_pause_after_each_layer_changes_no_bit(tiny: FrozenBackbone, registered: Callable[..., Task]) -> None:
    model, pauses = CombinedModel(tiny, [registered("digits")]), []
    images = probe_images(tiny)
    expected = model(images)["digits"]
    assert torch.equal(model(images, pause=lambda: pauses.append(1))["digits"], expected)
    assert len(pauses) == tiny.depth


def test_a_joining_task_gives_way_to_requests_and_is_served_once_its_golden_probe_holds(
    tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("digits")
    monkeypatch.setattr(module, "PATIENCE_S", 600)

    async def ask() -> None:
        service = Service(tiny, registry)
        with service.batcher.reserve(1):  # as if an image waited all the time
            registered("joining", seed=3)
            assert not await asyncio.to_thread(service.follower.settle, registry.generation, 2)
            assert [*(await asyncio.wait_for(service.predict(images_of(1)), 120)).logits] == ["digits"]
        assert await asyncio.to_thread(service.follower.settle, registry.generation, 120)
        assert [*(await service.predict(images_of(1))).logits] == ["digits", "joining"]
        await service.close()

    asyncio.run(ask())
