"""The service under HTTP: snapshots, the follower and the batcher."""

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
from addenda.combined import TaskLogits, golden, tiles
from addenda.combined.attention import memory_key_values
from addenda.exceptions import DataError, DeadlineError, OverloadedError
from addenda.serving.batcher import Batcher
from addenda.serving.service import Limits, ServedPrediction, Service
from addenda.serving.snapshot import Snapshot, first, following
from tests.support.databases import tamper
from tests.support.servers import client_of
from tests.support.tasks import random_task

Register = Callable[..., Task]
Found = TypeVar("Found", TaskLogits, ServedPrediction)


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
def held(batcher: Batcher) -> Iterator[None]:
    """The model's thread is busy, so that images wait."""
    free = threading.Event()
    batcher._thread.submit(free.wait)
    try:
        yield
    finally:
        free.set()


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


async def started(*work: Coroutine[Any, Any, Found]) -> list[asyncio.Task[Found]]:
    """Work that has come as far as it can."""
    tasks = [asyncio.ensure_future(one) for one in work]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def snapshot_of(registry: Registry, backbone: FrozenBackbone) -> Snapshot:
    return following(first(backbone), registry)


def test_a_swap_shares_all_that_was_there(
    tiny: FrozenBackbone, registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        registered(f"old-{number}", seed=number)
    before = snapshot_of(registry, tiny)
    registered("new", seed=9)
    computed: list[torch.Tensor] = []

    def noted(backbone: FrozenBackbone, block: torch.nn.Module, memory: torch.Tensor) -> KeyValue:
        computed.append(memory[0])
        return memory_key_values(backbone, block, memory)

    monkeypatch.setattr(tiles, "memory_key_values", noted)
    after = following(before, registry)
    assert after.model.tasks["new"].memory is not None
    layers = [*after.model.tasks["new"].memory]
    assert computed
    assert all(any(torch.equal(memory, layer) for layer in layers) for memory in computed), "of the new task alone"
    assert after.generation > before.generation
    assert [*after.model.tasks] == [*before.model.tasks, "new"]
    for name, task in before.model.tasks.items():
        assert after.model.tasks[name] is task
    assert [*before.records] == ["old-0", "old-1", "old-2"], "what others hold is never altered"


def test_a_retired_task_is_not_served_and_leaves_nothing_behind(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("stays")
    snapshot = snapshot_of(registry, tiny)
    for number in range(8):
        registered("comes", new_version=number > 0, seed=number)
        snapshot = following(snapshot, registry)
        assert [*snapshot.records] == ["stays", "comes"]
        registry.retire(f"comes:{number + 1}")
        snapshot = following(snapshot, registry)
        assert [*snapshot.records] == ["stays"]
        if number == 3:
            before = live_tensors()
    assert live_tensors() == before


@pytest.mark.parametrize("alias", [None, "production"])
def test_a_server_that_answers_nothing_warns(
    tiny: FrozenBackbone, registry: Registry, registered: Register, caplog: pytest.LogCaptureFixture, alias: str | None
) -> None:
    if alias is not None:
        registered("digits")
    with client_of(tiny, registry, alias=alias):
        said = "has the alias 'production'" if alias else "is registered"
        assert f"Nothing is answered: no task of backbone tiny {said}" in caplog.text


def test_what_is_served_is_named_and_the_rest_counted(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    for number in range(12):
        registered(f"task-{number:02}")
    said = snapshot_of(registry, tiny).absence("other")
    assert said.startswith("is not served. Served: 'task-00', 'task-01'")
    assert said.endswith("'task-09' and 2 more.")


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_an_alias_decides_what_is_served(tiny: FrozenBackbone, registry: Registry, registered: Register) -> None:
    registered("digits", seed=1)
    registry.set_alias("digits", "production", 1)
    registered("digits", new_version=True, seed=2)
    registered("strokes")
    snapshot = following(first(tiny), registry, "production")
    assert [record.ref for record in snapshot.records.values()] == ["digits:1"]
    registry.set_alias("digits", "production", 2)
    later = following(snapshot, registry, "production")
    assert [record.ref for record in later.records.values()] == ["digits:2"]
    registry.set_alias("digits", "production", 1)
    back = following(later, registry, "production")
    images = images_of(2)
    assert torch.equal(back.model(images)["digits"], snapshot.model(images)["digits"])
    assert not torch.equal(back.model(images)["digits"], later.model(images)["digits"])


@pytest.mark.parametrize("at_start", [True, False])
def test_a_damaged_task_and_one_that_answers_otherwise_are_quarantined_and_the_others_served(
    at_start: bool, tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("good")
    before = first(tiny) if at_start else snapshot_of(registry, tiny)
    damaged = registered("damaged", seed=1)
    tamper(registry, "artifact", "UPDATE artifact SET data = :data WHERE sha256 = :sha256", data=b"1234",
           sha256=damaged.sha256)  # fmt: skip
    other = random_task(tiny, "other", seed=2)
    registry.register(other, golden(tiny, random_task(tiny, "other", seed=3)))
    registered("fine", seed=4)
    snapshot = following(before, registry)
    assert [*snapshot.records] == [*snapshot.model.tasks] == ["good", "fine"]
    assert snapshot.quarantined.keys() == {"damaged:1", "other:1"}
    assert "cannot be trusted" in snapshot.quarantined["damaged:1"]
    assert "golden probe" in snapshot.quarantined["other:1"]


def test_images_of_many_requests_pass_together_with_the_bits_that_they_have_alone(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits", seed=1)
    registered("strokes", seed=2)
    snapshot, passes = snapshot_of(registry, tiny), []

    async def ask() -> list[TaskLogits]:
        batcher = Batcher(64, lambda images, seconds: passes.append(images))
        with held(batcher):
            names = [["digits"], ["strokes"], ["digits", "strokes"]]
            asked = [batcher.answer(snapshot, images_of(1 + i % 3, i), names[i % 3]) for i in range(6)]
            tasks = await started(*asked)
        found = await asyncio.gather(*tasks)
        await batcher.close()
        return found

    found = asyncio.run(ask())
    assert passes == [7, 5]
    for number, answers in enumerate(found):
        alone = snapshot.model(images_of(1 + number % 3, number))
        assert [*answers] == [["digits"], ["strokes"], ["digits", "strokes"]][number % 3]
        assert all(torch.equal(logits, alone[name]) for name, logits in answers.items())


def test_a_pass_never_holds_two_snapshots(tiny: FrozenBackbone, registry: Registry, registered: Register) -> None:
    registered("digits", seed=1)
    before, passes = snapshot_of(registry, tiny), []
    registered("digits", new_version=True, seed=2)
    after = following(before, registry)

    async def ask() -> list[TaskLogits]:
        batcher = Batcher(64, lambda images, seconds: passes.append(images))
        with held(batcher):
            await started(*(batcher.answer(before, images_of(1), ["digits"]) for _ in range(1)))
            order = (before, after, after, before)
            tasks = await started(*(batcher.answer(one, images_of(1), ["digits"]) for one in order))
        found = await asyncio.gather(*tasks)
        await batcher.close()
        return found

    found = [answers["digits"] for answers in asyncio.run(ask())]
    images = images_of(1)
    right = [one.model(images)["digits"] for one in (before, after, after, before)]
    assert not torch.equal(right[0], right[1])
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
    assert passes == [1, 1, 2, 1]


def test_a_large_request_lets_small_ones_pass_in_their_turn(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits")
    snapshot, order = snapshot_of(registry, tiny), []

    async def ask() -> None:
        batcher = Batcher(256)

        async def one(name: str, count: int) -> TaskLogits:
            answers = await batcher.answer(snapshot, images_of(count), ["digits"])
            order.append(name)
            return answers

        with held(batcher):
            tasks = await started(one("held", 1), one("large", 64), one("small", 1), one("large too", 64))
        await asyncio.gather(*tasks)
        await batcher.close()

    asyncio.run(ask())
    assert order.index("small") < order.index("large too")


def test_no_pass_runs_for_what_was_cancelled_or_is_late(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits")
    snapshot, passes = snapshot_of(registry, tiny), []

    async def ask() -> None:
        batcher = Batcher(64, lambda images, seconds: passes.append(images))
        with held(batcher):
            [first_] = await started(batcher.answer(snapshot, images_of(1), ["digits"]))
            late = asyncio.get_running_loop().time() + 0.01
            given_up, too_late, waiting = await started(
                batcher.answer(snapshot, images_of(2), ["digits"]),
                batcher.answer(snapshot, images_of(3), ["digits"], late),
                batcher.answer(snapshot, images_of(4), ["digits"]),
            )
            given_up.cancel()
            await asyncio.sleep(0.02)
        await asyncio.gather(first_, waiting)
        with pytest.raises(DeadlineError, match="before the model came"):
            await too_late
        assert given_up.cancelled()
        await batcher.close()

    asyncio.run(ask())
    assert passes == [1, 4]


def test_a_pass_that_fails_fails_alone(tiny: FrozenBackbone, registry: Registry, registered: Register) -> None:
    registered("digits")
    snapshot = snapshot_of(registry, tiny)

    async def ask() -> None:
        batcher = Batcher(64)
        unlike = [torch.zeros(3, 32, 32), torch.zeros(3, 8, 8)]
        with pytest.raises(RuntimeError, match="size"):
            await asyncio.wait_for(batcher.answer(snapshot, unlike, ["digits"]), 30)
        answers = await asyncio.wait_for(batcher.answer(snapshot, images_of(1), ["digits"]), 30)
        assert torch.equal(answers["digits"], snapshot.model(images_of(1))["digits"])
        await batcher.close()

    asyncio.run(ask())


def test_a_place_in_the_queue_is_given_back_however_a_request_ends(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits")

    async def ask() -> None:
        service = Service(tiny, registry, limits=Limits(waiting=4, images=8))
        with held(service.batcher):
            waiting = await started(*(service.answer(images_of(2)) for _ in range(2)))
            with pytest.raises(OverloadedError, match="4 images wait, and 1 more would be over 4") as refused:
                await service.answer(images_of(1))
            assert refused.value.retry_after_s >= 1
            waiting[0].cancel()
            await asyncio.gather(waiting[0], return_exceptions=True)
            assert service.batcher.num_waiting == 2
            with pytest.raises(DeadlineError, match=r"No answer within 0\.01 s"):
                await service.answer(images_of(2), timeout_s=0.01)
            assert service.batcher.num_waiting == 2
        await waiting[1]
        with pytest.raises(DataError):
            await service.answer([b"no image"])
        assert service.batcher.num_waiting == 0
        await service.close()

    asyncio.run(ask())


def test_requests_are_answered_from_the_snapshot_that_they_began_with(
    tiny: FrozenBackbone, registry: Registry, registered: Register
) -> None:
    registered("digits")

    async def ask() -> None:
        service = Service(tiny, registry)
        with held(service.batcher):
            [early] = await started(service.answer(images_of(1)))
            registered("strokes")
            assert await asyncio.to_thread(service.follower.settle, registry.generation, 10)
            [late] = await started(service.answer(images_of(1)))
        assert [*(await early).logits] == ["digits"]
        assert [*(await late).logits] == ["digits", "strokes"]
        assert (await early).snapshot.generation < (await late).snapshot.generation
        await service.close()

    asyncio.run(ask())
