"""The prediction service without HTTP: images in, predictions of one registry generation out."""

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
"""Logits below this are finite and stay so when divided by any temperature that a task may have."""


@dataclass(frozen=True)
class Limits:
    """Limits of one server."""

    body_bytes: int = 32 * 2**20  # of one request, decompressed
    bodies_bytes: int = 256 * 2**20  # of all requests together
    bundle_bytes: int = 256 * 2**20
    pixels: int = 50_000_000  # of an image
    images: int = 128  # of a request
    waiting: int = 256  # images queued or being computed
    timeout_s: float = 30.0  # of a request; it may ask for less


@dataclass(frozen=True, eq=False)
class ServedPrediction:
    """Predictions for a request's images from one snapshot, and the router's choice for each image if it was used."""

    snapshot: Snapshot
    logits: TaskLogits
    choices: list[Choice] | None = None


class Service:
    """Predicts with the current tasks of a registry. Create it on the event loop that uses it."""

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
        self._attention_thread = ThreadPoolExecutor(1, thread_name_prefix="addenda-attention")
        self._router_of, self._routing = lru_cache(maxsize=1)(self._make_router), asyncio.Lock()

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot served now."""
        return self.follower.snapshot

    async def close(self) -> None:
        """Stops all threads."""
        await self.batcher.close()
        await asyncio.to_thread(self.follower.stop)
        self._decoders.shutdown()
        self._attention_thread.shutdown()

    async def predict(
        self,
        images: Sequence[bytes] | Float[Tensor, "B 3 H W"],
        tasks: Sequence[str] | None = None,
        timeout_s: float | None = None,
        snapshot: Snapshot | None = None,
    ) -> ServedPrediction:
        """Predicts for encoded image files or preprocessed images; `tasks` defaults to all."""
        snapshot = snapshot or self.snapshot
        names = self._check_served(snapshot, tasks)
        logits = await self._predict(snapshot, images, names, timeout_s, features=False)
        flat = [values.flatten() for values in logits.values()]
        if flat and not (torch.cat(flat).abs() < SMALL).all():  # NaN fails this too; one check covers all tasks
            requested = [snapshot.model.tasks[name] for name in names]
            invalid = [task for task in requested if not is_finite(logits[task.name], task.objective, task.temperature)]
            if invalid and len(invalid) == len(names) and isinstance(images, Tensor):
                raise DataError("These pixel values give logits that are not finite.")
            if invalid:
                raise not_finite(invalid[0])
        return ServedPrediction(snapshot, logits)

    async def route(self, images: Sequence[bytes], timeout_s: float | None = None) -> ServedPrediction:
        """Predicts with every task that has routing statistics, and lets a router choose one of them for each image."""
        snapshot = self.snapshot
        async with self._routing:
            router = await asyncio.to_thread(self._router_of, snapshot)
        logits = await self._predict(snapshot, images, router.tasks, timeout_s, features=True)
        assert logits.features is not None
        return ServedPrediction(snapshot, logits, await asyncio.to_thread(router.choose, logits.features))

    async def attention(
        self, image: bytes, task: str
    ) -> tuple[Snapshot, Float[Tensor, "rows columns"], tuple[int, int]]:
        """The attention of a task's class token over an image's patches, and the image's size; runs one at a time."""
        snapshot = self.snapshot
        self._check_served(snapshot, [task])

        def compute() -> tuple[Snapshot, Tensor, tuple[int, int]]:
            pixels, size = self._decode(0, image)
            return snapshot, attention_map(self.backbone, snapshot.model.tasks[task], pixels.unsqueeze(0))[0], size

        async with self._reserve(1):
            return await asyncio.get_running_loop().run_in_executor(self._attention_thread, compute)

    def verify(self) -> tuple[Snapshot, list[Verdict]]:
        """Recomputes golden probes on the served model. Blocks the calling thread."""
        snapshot = self.snapshot
        served = snapshot.model.tasks.values()
        self.backbone.check_unchanged()
        return snapshot, verdicts(snapshot.model, [(task, self.registry.goldens(task.ref)) for task in served])

    def _check_served(self, snapshot: Snapshot, tasks: Sequence[str] | None) -> tuple[str, ...]:
        """The requested tasks without duplicates (None: all); raises UnknownTaskError if one is not served."""
        for name in tasks or ():
            if name not in snapshot.model.tasks:
                raise UnknownTaskError(f"Task {name!r} {snapshot.absence(name)}")
        return tuple(snapshot.model.tasks if tasks is None else dict.fromkeys(tasks))

    async def _predict(
        self,
        snapshot: Snapshot,
        images: Sequence[bytes] | Tensor,
        names: tuple[str, ...],
        timeout_s: float | None,
        features: bool,
    ) -> TaskLogits:
        if not 0 < len(images) <= self.limits.images:
            raise DataError(f"A request has 1 to {self.limits.images} images; this one has {len(images)}.")
        if len(images) > self.limits.waiting:
            raise TooLargeError(
                f"This request has {len(images)} images; the queue holds at most {self.limits.waiting} (--max-waiting)."
            )
        async with self._reserve(len(images), timeout_s) as deadline:
            if isinstance(images, Tensor):
                self.backbone.check_images(images)
                return await self.batcher.predict(snapshot, images, names, deadline, features)
            loop = asyncio.get_running_loop()
            decoding = [loop.run_in_executor(self._decoders, self._decode, i, file) for i, file in enumerate(images)]
            pixels = [decoded for decoded, _ in await asyncio.gather(*decoding)]
            return await self.batcher.predict(snapshot, pixels, names, deadline, features)

    @asynccontextmanager
    async def _reserve(self, num_images: int, timeout_s: float | None = None) -> AsyncIterator[float]:
        """Reserves queue capacity and enforces the timeout; yields the deadline on the event loop's clock."""
        timeout_s = min(timeout_s or self.limits.timeout_s, self.limits.timeout_s)
        with self.batcher.reserve(num_images):
            try:
                async with asyncio.timeout(timeout_s):
                    yield asyncio.get_running_loop().time() + timeout_s
            except TimeoutError as error:
                raise DeadlineError(f"The request timed out after {timeout_s:g} s.") from error

    def _decode(self, number: int, data: bytes) -> tuple[Float[Tensor, "3 H W"], tuple[int, int]]:
        """Decodes and preprocesses an image file; also returns its width and height."""
        image = read_image(BytesIO(data), f"Image {number}", FORMATS, self.limits.pixels)
        return self.backbone.transform(image), image.size

    def _make_router(self, snapshot: Snapshot) -> Router:
        statistics = {name: self.registry.statistics(record.ref) for name, record in snapshot.records.items()}
        width = self.backbone.embed_dim
        routable = {name: each for name, each in statistics.items() if each is not None and can_be_routed(each, width)}
        if not routable:
            raise RegistryError("No registered task has routing statistics.")
        return Router(routable)
