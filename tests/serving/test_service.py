"""The prediction service without HTTP: snapshots, the follower and the batcher."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch

from addenda import FrozenBackbone, Registry, Task
from addenda.backbones import KeyValue
from addenda.combined import golden, tiles
from addenda.combined.tiles import memory_key_values
from addenda.exceptions import DataError, DeadlineError, OverloadedError
from addenda.serving.model_thread import ModelThread
from addenda.serving.outputs import Outputs, Wanted
from addenda.serving.service import Batcher, Limits, ServedPrediction, Service
from addenda.serving.snapshot import Snapshot, empty_snapshot, next_snapshot
from tests.support.databases import tamper
from tests.support.servers import client_of
from tests.support.tasks import random_task

Register = Callable[..., Task]
Result = TypeVar("Result", Outputs, ServedPrediction)


def test_a_server_without_a_task_is_ready(tiny: FrozenBackbone, registry: Registry) -> None:
    with client_of(tiny, registry) as client:
        assert client.get("/readyz").json() == {"ready": True}


def test_a_registered_task_is_served(tiny: FrozenBackbone, registry: Registry, registered: Register) -> None:
    registered("digits")
    with client_of(tiny, registry) as client:
        service = client.app.state.service
        assert list(service.snapshot.model.tasks) == ["digits"]
        registered("strokes")
        assert service.follower.settle(registry.generation, 10)
        assert list(service.snapshot.model.tasks) == ["digits", "strokes"]


@contextmanager
def busy(batcher: Batcher) -> Iterator[None]:
    """Keeps the model thread busy, so that images are queued."""
    done = threading.Event()
    batcher._model_thread.run(done.wait)
    try:
        yield
    finally:
        done.set()


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


async def started(*coroutines: Coroutine[Any, Any, Result]) -> list[asyncio.Task[Result]]:
    """Starts coroutines and runs them until they wait."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def snapshot_of(registry: Registry, backbone: FrozenBackbone) -> Snapshot:
    return next_snapshot(empty_snapshot(backbone), registry)


def test_the_next_snapshot_shares_the_tasks_of_the_previous_one(
    tiny: FrozenBackbone, registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        registered(f"old-{number}", seed=number)
    before = snapshot_of(registry, tiny)
    registered("new", seed=9)
    computed: list[torch.Tensor] = []

    def record(backbone: FrozenBackbone, block: torch.nn.Module, memory: torch.Tensor) -> KeyValue:
        computed.append(memory[0])
        return memory_key_values(backbone, block, memory)

    monkeypatch.setattr(tiles, "memory_key_values", record)
    after = next_snapshot(before, registry)
    assert after.model.tasks["new"].memory is not None
    layers = [*after.model.tasks["new"].memory]
    assert computed
    assert all(any(torch.equal(memory, layer) for layer in layers) for memory in computed), "only of the new task"
    assert after.generation > before.generation
    assert [*after.model.tasks] == [*before.model.tasks, "new"]
    for name, task in before.model.tasks.items():
        assert after.model.tasks[name] is task
    assert [*before.records] == ["old-0", "old-1", "old-2"], "a snapshot is never mutated"


@pytest.mark.slow
def test_a_retired_task_is_not_served_and_its_tensors_are_freed(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("stays")
    snapshot = snapshot_of(registry, tiny)
    for number in range(8):
        registered("comes", new_version=number > 0, seed=number)
        snapshot = next_snapshot(snapshot, registry)
        assert [*snapshot.records] == ["stays", "comes"]
        registry.retire(f"comes:{number + 1}")
        snapshot = next_snapshot(snapshot, registry)
        assert [*snapshot.records] == ["stays"]
        if number == 3:
            before = live_tensors()
    assert live_tensors() == before


@pytest.mark.parametrize("alias", [None, "production"])
def test_a_server_without_served_tasks_logs_a_warning(
    tiny: FrozenBackbone, registry: Registry, registered: Register, caplog: pytest.LogCaptureFixture, alias: str | None
) -> None:
    if alias is not None:
        registered("digits")
    with client_of(tiny, registry, alias=alias):
        condition = "has the alias 'production'" if alias else "is registered"
        assert f"No task is served: no task of backbone tiny {condition}" in caplog.text


def test_an_error_lists_ten_served_tasks_and_counts_the_others(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    for number in range(12):
        registered(f"task-{number:02}")
    message = snapshot_of(registry, tiny).absence("other")
    assert message.startswith("is not served. Served: 'task-00', 'task-01'")
    assert message.endswith("'task-09' and 2 more.")


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_only_versions_with_the_alias_are_served(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits", seed=1)
    registry.set_alias("digits", "production", 1)
    registered("digits", new_version=True, seed=2)
    registered("strokes")
    snapshot = next_snapshot(empty_snapshot(tiny), registry, "production")
    assert [record.ref for record in snapshot.records.values()] == ["digits:1"]
    registry.set_alias("digits", "production", 2)
    later = next_snapshot(snapshot, registry, "production")
    assert [record.ref for record in later.records.values()] == ["digits:2"]
    registry.set_alias("digits", "production", 1)
    back = next_snapshot(later, registry, "production")
    images = images_of(2)
    assert torch.equal(back.model(images)["digits"], snapshot.model(images)["digits"])
    assert not torch.equal(back.model(images)["digits"], later.model(images)["digits"])


@pytest.mark.parametrize("at_start", [True, False])
def test_damaged_tasks_and_tasks_with_other_logits_are_quarantined_and_the_others_served(
    at_start: bool, tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("good")
    before = empty_snapshot(tiny) if at_start else snapshot_of(registry, tiny)
    damaged = registered("damaged", seed=1)
    tamper(registry, "artifact", "UPDATE artifact SET data = :data WHERE sha256 = :sha256", data=b"1234",
           sha256=damaged.sha256)  # fmt: skip
    other = random_task(tiny, "other", seed=2)
    registry.register(other, golden(tiny, random_task(tiny, "other", seed=3)))
    registered("fine", seed=4)
    snapshot = next_snapshot(before, registry)
    assert [*snapshot.records] == [*snapshot.model.tasks] == ["good", "fine"]
    assert snapshot.quarantined.keys() == {"damaged:1", "other:1"}
    assert "cannot be trusted" in snapshot.quarantined["damaged:1"]
    assert "golden probe" in snapshot.quarantined["other:1"]


def test_batching_across_requests_is_bitwise_identical_to_single_requests(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits", seed=1)
    registered("strokes", seed=2)
    snapshot, passes = snapshot_of(registry, tiny), []

    async def ask() -> list[Outputs]:
        batcher = Batcher(64, ModelThread())
        batcher.report = lambda images, seconds: passes.append(images)
        with busy(batcher):
            names = [["digits"], ["strokes"], ["digits", "strokes"]]
            requests = [
                batcher.predict(snapshot, images_of(1 + i % 3, i), Wanted(tuple(names[i % 3]))) for i in range(6)
            ]
            tasks = await started(*requests)
        results = await asyncio.gather(*tasks)
        await batcher.close()
        return results

    results = asyncio.run(ask())
    assert passes == [7, 5]
    for number, result in enumerate(results):
        alone = snapshot.model(images_of(1 + number % 3, number))
        assert [*result] == [["digits"], ["strokes"], ["digits", "strokes"]][number % 3]
        assert all(torch.equal(logits, alone[name]) for name, logits in result.items())


def test_a_forward_pass_never_mixes_two_snapshots(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits", seed=1)
    before, passes = snapshot_of(registry, tiny), []
    registered("digits", new_version=True, seed=2)
    after = next_snapshot(before, registry)

    async def ask() -> list[Outputs]:
        batcher = Batcher(64, ModelThread())
        batcher.report = lambda images, seconds: passes.append(images)
        with busy(batcher):
            await started(*(batcher.predict(before, images_of(1), Wanted(("digits",))) for _ in range(1)))
            order = (before, after, after, before)
            tasks = await started(*(batcher.predict(snapshot, images_of(1), Wanted(("digits",))) for snapshot in order))
        results = await asyncio.gather(*tasks)
        await batcher.close()
        return results

    logits = [result["digits"] for result in asyncio.run(ask())]
    images = images_of(1)
    expected = [snapshot.model(images)["digits"] for snapshot in (before, after, after, before)]
    assert not torch.equal(expected[0], expected[1])
    assert all(torch.equal(*pair) for pair in zip(logits, expected, strict=True))
    assert passes == [1, 1, 2, 1]


def test_small_requests_are_not_delayed_by_a_later_large_one(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits")
    snapshot, order = snapshot_of(registry, tiny), []

    async def ask() -> None:
        batcher = Batcher(256, ModelThread())

        async def send(name: str, count: int) -> Outputs:
            result = await batcher.predict(snapshot, images_of(count), Wanted(("digits",)))
            order.append(name)
            return result

        with busy(batcher):
            tasks = await started(send("first", 1), send("large", 64), send("small", 1), send("large too", 64))
        await asyncio.gather(*tasks)
        await batcher.close()

    asyncio.run(ask())
    assert order.index("small") < order.index("large too")


def test_no_forward_pass_runs_for_cancelled_or_expired_requests(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits")
    passes: list[int] = []

    async def ask() -> None:
        service = Service(tiny, registry)
        service.batcher.report = lambda images, seconds: passes.append(images)
        with busy(service.batcher):
            [first] = await started(service.predict(images_of(1)))
            cancelled, expired, waiting = await started(
                service.predict(images_of(2)),
                service.predict(images_of(3), timeout_s=0.01),
                service.predict(images_of(4)),
            )
            cancelled.cancel()
            await asyncio.sleep(0.02)
        await asyncio.gather(first, waiting)
        with pytest.raises(DeadlineError, match=r"timed out after 0\.01 s"):
            await expired
        assert cancelled.cancelled()
        await service.close()

    asyncio.run(ask())
    assert passes == [1, 4]


def test_a_failed_forward_pass_fails_only_its_own_requests(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits")
    snapshot = snapshot_of(registry, tiny)

    async def ask() -> None:
        batcher = Batcher(64, ModelThread())
        unlike = [torch.zeros(3, 32, 32), torch.zeros(3, 8, 8)]
        with pytest.raises(RuntimeError, match="size"):
            await asyncio.wait_for(batcher.predict(snapshot, unlike, Wanted(("digits",))), 30)
        result = await asyncio.wait_for(batcher.predict(snapshot, images_of(1), Wanted(("digits",))), 30)
        assert torch.equal(result["digits"], snapshot.model(images_of(1))["digits"])
        await batcher.close()

    asyncio.run(ask())


def test_queue_capacity_is_released_however_a_request_ends(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits")

    async def ask() -> None:
        service = Service(tiny, registry, limits=Limits(waiting_images=4, images=8))
        with busy(service.batcher):
            waiting = await started(*(service.predict(images_of(2)) for _ in range(2)))
            with pytest.raises(
                OverloadedError, match=r"The queue is full: .* has 1 images, 4 of at most 4 "
            ) as rejected:
                await service.predict(images_of(1))
            assert rejected.value.retry_after_s >= 1
            waiting[0].cancel()
            await asyncio.gather(waiting[0], return_exceptions=True)
            assert service.batcher.num_waiting == 2
            with pytest.raises(DeadlineError, match=r"timed out after 0\.01 s"):
                await service.predict(images_of(2), timeout_s=0.01)
            assert service.batcher.num_waiting == 2
        await waiting[1]
        with pytest.raises(DataError):
            await service.predict([b"no image"])
        assert service.batcher.num_waiting == 0
        await service.close()

    asyncio.run(ask())


def test_requests_use_the_snapshot_from_their_start(
    tiny: FrozenBackbone, registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("digits")

    async def ask() -> None:
        service = Service(tiny, registry)
        with monkeypatch.context() as patch:
            patch.setattr(service.batcher, "_next", list)  # images stay queued
            [early] = await started(service.predict(images_of(1)))
            registered("strokes")
            assert await asyncio.to_thread(service.follower.settle, registry.generation, 10)
            [late] = await started(service.predict(images_of(1)))
        service.batcher._filled.set()
        assert [*(await early).logits] == ["digits"]
        assert [*(await late).logits] == ["digits", "strokes"]
        assert (await early).snapshot.generation < (await late).snapshot.generation
        await service.close()

    asyncio.run(ask())


def test_a_request_that_waits_for_a_router_has_a_timeout(
    tiny: FrozenBackbone, registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("digits")
    made = threading.Event()
    monkeypatch.setattr("addenda.serving.service.Router", lambda statistics: made.wait(60))
    monkeypatch.setattr("addenda.serving.service.can_be_routed", lambda *arguments: True)

    async def ask() -> None:
        service = Service(tiny, registry)
        monkeypatch.setattr(service.registry, "statistics", lambda ref: object())
        with pytest.raises(DeadlineError):
            await service.route([b"image"], 0.05)
        assert service.batcher.num_waiting == 0
        made.set()
        await service.close()

    asyncio.run(ask())


def test_predictions_do_not_wait_for_a_router_that_is_being_made(
    tiny: FrozenBackbone, registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("digits")
    entered, made = threading.Event(), threading.Event()

    def slowly(statistics: object) -> None:
        entered.set()
        made.wait(60)
        raise DataError("made at last")

    monkeypatch.setattr("addenda.serving.service.Router", slowly)
    monkeypatch.setattr("addenda.serving.service.can_be_routed", lambda *arguments: True)

    async def ask() -> None:
        service = Service(tiny, registry)
        monkeypatch.setattr(service.registry, "statistics", lambda ref: object())
        routed = asyncio.ensure_future(service.route([b"image"]))
        assert await asyncio.to_thread(entered.wait, 60)
        assert [*(await asyncio.wait_for(service.predict(images_of(1)), 30)).logits] == ["digits"]
        made.set()
        with pytest.raises(DataError, match="made at last"):
            await routed
        await service.close()

    asyncio.run(ask())
