"""The cache by content: equal bytes, and never a hit across a change of image, artifacts or numerics."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from addenda import FrozenBackbone, Registry, Task
from addenda.serving.content_cache import ENTRY_BYTES, ContentCache
from addenda.serving.keys import KeyFile
from addenda.serving.outputs import Outputs
from addenda.serving.service import Limits
from tests.serving.test_api import picture
from tests.support.servers import AppClient, client_of
from tests.support.tiny import tiny_vit

PREDICT, EMBED = "/api/v1/predict", "/api/v1/embed?features=pooled,task:digits"
CACHED = Limits(cache_bytes=10**7)


@pytest.fixture
def own() -> FrozenBackbone:
    """A backbone whose weights a test may change."""
    return FrozenBackbone(tiny_vit(), "tiny", "hub")


@pytest.fixture
def client(own: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Iterator[AppClient]:
    registered("digits")
    registered("strokes", seed=5)
    with client_of(own, registry, limits=CACHED) as opened:
        yield opened


def test_a_hit_has_the_bytes_of_the_miss_for_each_request_of_its_own(client: AppClient) -> None:
    image = picture()
    requests = [PREDICT, f"{PREDICT}?tasks=digits", f"{PREDICT}?tasks=strokes,digits", EMBED, "/api/v1/embed"]
    first = [client.post(url, content=image) for url in requests]
    again = [client.post(url, content=image) for url in requests]
    assert [response.headers["x-cache"] for response in first] == ["miss"] * len(requests)
    assert [response.headers["x-cache"] for response in again] == ["hit"] * len(requests)
    assert [response.content for response in again] == [response.content for response in first]
    limited = client.post(f"{PREDICT}?top=1", content=image)
    assert (limited.headers["x-cache"], limited.status_code) == ("hit", 200), "limits apply to cached logits"
    assert [len(task["labels"]) for task in limited.json()["tasks"].values()] == [1, 1]
    assert client.post(PREDICT, content=picture(1)).headers["x-cache"] == "miss"
    metrics = client.get("/metrics").text
    assert 'addenda_cache_images_total{result="hit"} 6.0' in metrics
    assert 'addenda_cache_images_total{result="miss"} 6.0' in metrics


def test_images_of_one_request_are_cached_one_by_one(client: AppClient) -> None:
    service, images = client.app.state.service, [picture(seed) for seed in range(3)]
    passes: list[int] = []
    service.batcher.report = lambda count, seconds: passes.append(count)

    def predict(files: Sequence[bytes]) -> Outputs:
        return client.portal.call(service.predict, files).logits

    alone = [predict([image]) for image in images[:2]]
    together = predict(images)
    assert (together.cached, passes) == (False, [1, 1, 1])
    again = predict(images[::-1])
    assert (again.cached, passes) == (True, [1, 1, 1])
    assert torch.equal(again.matrix, together.matrix.flip(0))
    assert torch.equal(torch.cat([each.matrix for each in alone]), together.matrix[:2])


def test_a_task_that_is_replaced_or_renamed_is_computed_anew(
    client: AppClient, registry: Registry, registered: Callable[..., Task]
) -> None:
    service, image, url = client.app.state.service, picture(), f"{PREDICT}?tasks=digits"
    before = client.post(url, content=image)
    registered("digits", new_version=True, seed=8)
    assert service.follower.settle(registry.generation, 30)
    after = client.post(url, content=image)
    assert after.headers["x-cache"] == "miss"
    assert after.json()["tasks"]["digits"]["ref"] == "digits:2"
    assert after.json()["tasks"]["digits"] != before.json()["tasks"]["digits"]
    registry.retire("digits:2")
    assert service.follower.settle(registry.generation, 30)
    back = client.post(url, content=image)
    assert back.headers["x-cache"] == "hit", "the same artifacts as at first"
    assert back.json()["tasks"] == before.json()["tasks"]
    assert back.json()["generation"] == registry.generation


def test_a_change_of_settings_is_refused_and_not_answered_from_the_cache(client: AppClient) -> None:
    image = picture()
    expected = client.post(PREDICT, content=image).content
    torch.set_default_dtype(torch.float64)
    try:
        response = client.post(PREDICT, content=image)
    finally:
        torch.set_default_dtype(torch.float32)
    assert response.status_code == 500
    assert "A setting that can change bits has changed" in response.json()["detail"]
    assert client.post(PREDICT, content=image).content == expected


def test_weights_that_are_written_to_are_refused_and_not_answered_from_the_cache(
    client: AppClient, own: FrozenBackbone
) -> None:
    image = picture()
    assert client.post(PREDICT, content=image).status_code == 200
    with torch.no_grad():
        next(own.blocks[0].parameters()).add_(1)
    response = client.post(PREDICT, content=image)
    assert response.status_code == 422
    assert "x-cache" not in response.headers


def test_a_key_is_checked_before_the_cache(
    own: FrozenBackbone, registry: Registry, registered: Callable[..., Task], tmp_path: object
) -> None:
    registered("digits")
    keys, image = KeyFile(f"{tmp_path}/keys.json"), picture()
    key = keys.create("shop", "predict")
    with client_of(own, registry, keys, limits=CACHED) as client:
        for _ in range(2):
            known = client.post(PREDICT, content=image, headers={"Authorization": f"Bearer {key}"})
        assert known.headers["x-cache"] == "hit"
        for header in ({}, {"Authorization": "Bearer other"}):
            refused = client.post(PREDICT, content=image, headers=header)
            assert (refused.status_code, "x-cache" in refused.headers) == (401, False)


def test_without_a_cache_nothing_is_said_about_one(tiny: FrozenBackbone, registry: Registry) -> None:
    with client_of(tiny, registry) as client:
        assert "x-cache" not in client.post(PREDICT, content=picture()).headers


@pytest.mark.slow
def test_memory_is_bounded_and_the_least_recently_used_entry_is_evicted() -> None:
    cache, width = ContentCache(3 * (ENTRY_BYTES + 400) + 100), 100
    hits: list[bool] = []
    cache.report = hits.append

    async def ask(*keys: bytes) -> Outputs:
        async def compute(numbers: Sequence[int]) -> Outputs:
            batch = torch.arange(len(numbers) * width, dtype=torch.float32).reshape(len(numbers), width)
            return Outputs.of(len(numbers), {"a": batch}, True)

        return await cache.outputs(keys, {"a": width}, compute)

    asyncio.run(ask(b"1", b"2", b"3"))
    asyncio.run(ask(b"1", b"4"))
    assert hits == [False, False, False, True, False]
    hits.clear()
    for key in (b"1", b"3", b"4", b"2"):
        asyncio.run(ask(key))
    assert hits == [True, True, True, False]
    assert cache.size_bytes == 3 * (ENTRY_BYTES + 400)
    gc.collect()
    kept = [tensor for entry in cache._entries.values() for tensor in entry if tensor is not None]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 3 * 400, "rows do not keep their batch"
    asyncio.run(ask(*(bytes([number]) for number in range(50))))
    assert cache.size_bytes <= cache.max_bytes
