"""Serving without HTTP: images in, answers of one generation out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, read_image
from addenda.combined import Choice, Router, TaskLogits, Verdict, attention_map, can_be_routed, not_finite, verdicts
from addenda.exceptions import DataError, DeadlineError, RegistryError, TooLargeError, UnknownTaskError
from addenda.registry import Registry, is_finite
from addenda.serving.batcher import Batcher, Report
from addenda.serving.snapshot import Follower, Snapshot

FORMATS = ("JPEG", "PNG", "WEBP")
SMALL = 1e30
"""Logits below are finite, and so are they when they are divided by any temperature that a task may have."""


@dataclass(frozen=True)
class Limits:
    """What one server takes."""

    body_bytes: int = 32 * 2**20  # of a request, after it is inflated
    bodies_bytes: int = 256 * 2**20  # of all requests that are in memory at one time
    bundle_bytes: int = 256 * 2**20
    pixels: int = 50_000_000  # of an image
    images: int = 128  # of a request
    waiting: int = 256  # images that wait or are answered at one time
    timeout_s: float = 30.0  # for an answer, where the request names no shorter time


@dataclass(frozen=True, eq=False)
class ServedPrediction:
    """Answers about some images, all from one snapshot; where a router was asked to, its choice for each image."""

    snapshot: Snapshot
    logits: TaskLogits
    choices: list[Choice] | None = None


class Service:
    """Answers images with the tasks of a registry as it is at every moment. Make it on the event loop that uses it."""

    def __init__(
        self,
        backbone: FrozenBackbone,
        registry: Registry,
        alias: str | None = None,
        limits: Limits | None = None,
        report: Report = lambda images, seconds: None,
    ) -> None:
        self.backbone, self.registry, self.alias = backbone, registry, alias
        self.limits = limits or Limits()
        self.follower = Follower(backbone, registry, alias)
        self.batcher = Batcher(self.limits.waiting, report)
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="addenda-decoder")
        self._looker = ThreadPoolExecutor(1, thread_name_prefix="addenda-looker")
        self._router_of, self._routing = lru_cache(maxsize=1)(self._make_router), asyncio.Lock()

    @property
    def snapshot(self) -> Snapshot:
        """What is served now."""
        return self.follower.snapshot

    async def close(self) -> None:
        """Ends its threads."""
        await self.batcher.close()
        await asyncio.to_thread(self.follower.stop)
        self._decoders.shutdown()
        self._looker.shutdown()

    async def answer(
        self,
        images: Sequence[bytes] | Float[Tensor, "B 3 H W"],
        tasks: Sequence[str] | None = None,
        timeout_s: float | None = None,
        snapshot: Snapshot | None = None,
    ) -> ServedPrediction:
        """Answers encoded image files, or images as the backbone's transform gives them; all tasks, or the named."""
        snapshot = snapshot or self.snapshot
        names = self._served(snapshot, tasks)
        answers = await self._pass(snapshot, images, names, timeout_s, pooled=False)
        flat = [one.flatten() for one in answers.values()]
        if flat and not (torch.cat(flat).abs() < SMALL).all():  # NaN is not; one look at all tasks' together
            tasks_asked = [snapshot.model.tasks[name] for name in names]
            wrong = [one for one in tasks_asked if not is_finite(answers[one.name], one.objective, one.temperature)]
            if wrong and len(wrong) == len(names) and isinstance(images, Tensor):
                raise DataError("These pixel values give logits that are not finite.")
            if wrong:
                raise not_finite(wrong[0])
        return ServedPrediction(snapshot, answers)

    async def route(self, images: Sequence[bytes], timeout_s: float | None = None) -> ServedPrediction:
        """Lets a router choose a task for each image; answers of all tasks that it knows are there."""
        snapshot = self.snapshot
        async with self._routing:
            router = await asyncio.to_thread(self._router_of, snapshot)
        logits = await self._pass(snapshot, images, router.tasks, timeout_s, pooled=True)
        assert logits.pooled is not None
        return ServedPrediction(snapshot, logits, await asyncio.to_thread(router.choose, logits.pooled))

    async def look(self, image: bytes, task: str) -> tuple[Snapshot, Float[Tensor, "rows columns"], tuple[int, int]]:
        """Where a task's token looks, a weight of each patch, one image at a time; and the image's width and height."""
        snapshot = self.snapshot
        self._served(snapshot, [task])

        def looked() -> tuple[Snapshot, Tensor, tuple[int, int]]:
            pixels, size = self._decode(0, image)
            return snapshot, attention_map(self.backbone, snapshot.model.tasks[task], pixels.unsqueeze(0))[0], size

        async with self._place(1):
            return await asyncio.get_running_loop().run_in_executor(self._looker, looked)

    def verify(self) -> tuple[Snapshot, list[Verdict]]:
        """Recomputes golden probes on the model as it is served. It blocks its thread."""
        snapshot = self.snapshot
        served = snapshot.model.tasks.values()
        self.backbone.check_unchanged()
        return snapshot, verdicts(snapshot.model, [(task, self.registry.goldens(task.ref)) for task in served])

    def _served(self, snapshot: Snapshot, tasks: Sequence[str] | None) -> tuple[str, ...]:
        for name in tasks or ():
            if name not in snapshot.model.tasks:
                raise UnknownTaskError(f"Task {name!r} {snapshot.absence(name)}")
        return tuple(snapshot.model.tasks if tasks is None else dict.fromkeys(tasks))

    async def _pass(
        self,
        snapshot: Snapshot,
        images: Sequence[bytes] | Tensor,
        names: tuple[str, ...],
        timeout_s: float | None,
        pooled: bool,
    ) -> TaskLogits:
        if not 0 < len(images) <= self.limits.images:
            raise DataError(f"A request is of 1 to {self.limits.images} images, not {len(images)}.")
        if len(images) > self.limits.waiting:
            raise TooLargeError(
                f"The request has {len(images)} images, and {self.limits.waiting} may wait at one time: send fewer."
            )
        async with self._place(len(images), timeout_s) as deadline:
            if isinstance(images, Tensor):
                self.backbone.check_images(images)
                return await self.batcher.answer(snapshot, images, names, deadline, pooled)
            loop = asyncio.get_running_loop()
            decoding = [loop.run_in_executor(self._decoders, self._decode, *numbered) for numbered in enumerate(images)]
            pixels = [one for one, _ in await asyncio.gather(*decoding)]
            return await self.batcher.answer(snapshot, pixels, names, deadline, pooled)

    @asynccontextmanager
    async def _place(self, num_images: int, timeout_s: float | None = None) -> AsyncIterator[float]:
        """A place in the queue for some images, and until when on the event loop's clock."""
        timeout_s = min(timeout_s or self.limits.timeout_s, self.limits.timeout_s)
        with self.batcher.room(num_images):
            try:
                async with asyncio.timeout(timeout_s):
                    yield asyncio.get_running_loop().time() + timeout_s
            except TimeoutError as error:
                raise DeadlineError(f"No answer within {timeout_s:g} s.") from error

    def _decode(self, number: int, data: bytes) -> tuple[Float[Tensor, "3 H W"], tuple[int, int]]:
        """An image file as the backbone takes it, and its width and height."""
        image = read_image(BytesIO(data), f"Image {number}", FORMATS, self.limits.pixels)
        return self.backbone.transform(image), image.size

    def _make_router(self, snapshot: Snapshot) -> Router:
        kept = {name: self.registry.statistics(record.ref) for name, record in snapshot.records.items()}
        width = self.backbone.embed_dim
        known = {name: one for name, one in kept.items() if one is not None and can_be_routed(one, width)}
        if not known:
            raise RegistryError("There is no task to choose from: nothing was kept of any task's images.")
        return Router(known)
