"""The prediction service without HTTP: images in, predictions of one registry generation out."""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.backbones import FrozenBackbone, read_image
from addenda.combined import Choice, Router, TaskLogits, Verdict, attention_map, can_be_routed, not_finite, verdicts
from addenda.exceptions import DataError, DeadlineError, OverloadedError, RegistryError, TooLargeError, UnknownTaskError
from addenda.registry import Registry, is_finite
from addenda.serving.shared import Quota
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
    waiting_images: int = 256  # queued or being computed
    timeout_s: float = 30.0  # of a request; it may ask for less


Images = Sequence[bytes] | Float[Tensor, "B 3 H W"]
"""Encoded image files, or preprocessed images."""


@dataclass(frozen=True, eq=False)
class ServedPrediction:
    """Predictions for a request's images from one snapshot, and the router's choice for each image if it was used."""

    snapshot: Snapshot
    logits: TaskLogits
    choices: list[Choice] | None = None


class Service:
    """Predicts with the current tasks of a registry. Create it on the event loop that uses it."""

    def __init__(
        self, backbone: FrozenBackbone, registry: Registry, alias: str | None = None, limits: Limits | None = None
    ) -> None:
        self.backbone, self.registry, self.alias = backbone, registry, alias
        self.limits = limits or Limits()
        self.follower = Follower(backbone, registry, alias)
        self.batcher = Batcher(self.limits.waiting_images)
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
        images: Images,
        tasks: Sequence[str] | None = None,
        timeout_s: float | None = None,
        snapshot: Snapshot | None = None,
    ) -> ServedPrediction:
        """Predicts for images; `tasks` defaults to all."""
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
        snapshot, loop = self.snapshot, asyncio.get_running_loop()
        self._check_served(snapshot, [task])
        async with self._reserve(1):
            pixels, size = await loop.run_in_executor(self._decoders, self._decode, 0, image)
            arguments = self.backbone, snapshot.model.tasks[task], pixels.unsqueeze(0)
            weights = await loop.run_in_executor(self._attention_thread, attention_map, *arguments)
        return snapshot, weights[0], size

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
        self, snapshot: Snapshot, images: Images, names: tuple[str, ...], timeout_s: float | None, features: bool
    ) -> TaskLogits:
        if not 0 < len(images) <= self.limits.images:
            raise DataError(
                f"A request may have 1 to {self.limits.images} images; this one has {len(images)}. Divide it."
            )
        limit = self.limits.waiting_images
        if len(images) > limit:
            raise TooLargeError(
                f"This request has {len(images)} images; the queue holds at most {limit} (--max-waiting). Divide it."
            )
        async with self._reserve(len(images), timeout_s):
            if isinstance(images, Tensor):
                self.backbone.check_images(images)
                return await self.batcher.predict(snapshot, images, names, features)
            loop = asyncio.get_running_loop()
            decoding = [loop.run_in_executor(self._decoders, self._decode, i, file) for i, file in enumerate(images)]
            pixels = [decoded for decoded, _ in await asyncio.gather(*decoding)]
            return await self.batcher.predict(snapshot, pixels, names, features)

    @asynccontextmanager
    async def _reserve(self, num_images: int, timeout_s: float | None = None) -> AsyncIterator[None]:
        """Reserves queue capacity and enforces the timeout, which cancels queued images too."""
        timeout_s = min(timeout_s or self.limits.timeout_s, self.limits.timeout_s)
        with self.batcher.reserve(num_images):
            try:
                async with asyncio.timeout(timeout_s):
                    yield
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
            raise RegistryError(
                "No registered task has routing statistics, so none can be chosen; name tasks instead of 'auto'."
            )
        return Router(routable)


@dataclass(eq=False)
class _Chunk:
    """Queued images of one request, at most a micro-batch."""

    snapshot: Snapshot
    images: Sequence[Tensor]
    tasks: tuple[str, ...]
    features: bool
    result: asyncio.Future[TaskLogits] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Computes queued images in order of arrival, in forward passes of up to a micro-batch.

    There is no batching delay: the next batch fills up while a forward pass runs. Results do not depend on the rest of
    the batch, since the model pads every batch to a shape that its self-test has verified. Create, use and close it on
    one event loop.
    """

    def __init__(self, max_waiting: int) -> None:
        self.waiting = Quota(max_waiting)  # images queued or being computed
        self.report: Callable[[int, float], None] = lambda images, seconds: None  # called after each forward pass
        self._queue: deque[_Chunk] = deque()
        self._filled = asyncio.Event()
        self.seconds_per_image = 0.01
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="addenda-model")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stops the model thread and cancels queued work."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for chunk in self._queue:
            chunk.result.cancel()
        self._thread.shutdown()

    @contextmanager
    def reserve(self, num_images: int) -> Iterator[None]:
        """Reserves queue capacity for images, from before they are decoded until their predictions are computed."""
        if not self.waiting.take(num_images):
            seconds = math.ceil(self.num_waiting * self.seconds_per_image)
            raise OverloadedError(
                f"The queue is full: this request has {num_images} images, {self.num_waiting} of at most "
                f"{self.waiting.limit} are queued (--max-waiting). Try again later.",
                min(max(1, seconds), 60),
            )
        try:
            yield
        finally:
            self.waiting.give(num_images)

    @property
    def num_waiting(self) -> int:
        """Images queued or being computed."""
        return self.waiting.used

    async def predict(
        self, snapshot: Snapshot, images: Iterable[Float[Tensor, "3 H W"]], tasks: Sequence[str], features: bool = False
    ) -> TaskLogits:
        """Computes the logits of tasks of one snapshot; cancelling the call removes its images from the queue.

        `features` also returns the backbone's features.
        """
        pixels, size = list(images), snapshot.model.micro_batch
        parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        chunks = [_Chunk(snapshot, part, tuple(tasks), features) for part in parts]
        self._queue += chunks
        self._filled.set()
        try:
            results = await asyncio.gather(*(chunk.result for chunk in chunks))
        finally:
            for chunk in chunks:
                chunk.result.cancel()
        if len(results) == 1:
            return results[0]
        logits = {name: torch.cat([result[name] for result in results]) for name in tasks}
        computed = [result.features for result in results if result.features is not None]
        return TaskLogits(logits, results[0].exact, torch.cat(computed) if features else None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._filled.wait()
            batch = self._next()
            if not batch:
                self._filled.clear()
                continue
            started, num_images = loop.time(), sum(len(chunk.images) for chunk in batch)
            try:
                results = await loop.run_in_executor(self._thread, _compute, batch)
            except Exception as error:  # fails this batch only
                for chunk in batch:
                    if not chunk.result.done():
                        chunk.result.set_exception(error)
                continue
            seconds = loop.time() - started
            self.seconds_per_image += (seconds / num_images - self.seconds_per_image) / 10
            self.report(num_images, seconds)
            for chunk, result in zip(batch, results, strict=True):
                if not chunk.result.done():
                    chunk.result.set_result(result)

    def _next(self) -> list[_Chunk]:
        """Dequeues the next batch: the oldest chunks of one snapshot; drops cancelled ones."""
        batch: list[_Chunk] = []
        count = 0
        while self._queue:
            chunk = self._queue[0]
            if chunk.result.done():
                self._queue.popleft()
                continue
            if batch and (
                chunk.snapshot is not batch[0].snapshot or count + len(chunk.images) > chunk.snapshot.model.micro_batch
            ):
                break
            count += len(chunk.images)
            batch.append(self._queue.popleft())
        return batch


def _compute(batch: Sequence[_Chunk]) -> list[TaskLogits]:
    """Runs one forward pass for all tasks that any chunk requests, and splits the result by chunk."""
    requested = {name for chunk in batch for name in chunk.tasks}
    model = batch[0].snapshot.model
    tasks = [name for name in model.tasks if name in requested]
    images = torch.stack([image for chunk in batch for image in chunk.images])
    result = model(images, tasks, any(chunk.features for chunk in batch))
    sizes = [len(chunk.images) for chunk in batch]
    logits = {name: values.cpu().split(sizes) for name, values in result.items()}
    features = result.features.cpu().split(sizes) if result.features is not None else ()
    return [
        TaskLogits(
            {name: logits[name][i] for name in chunk.tasks}, result.exact, features[i] if chunk.features else None
        )
        for i, chunk in enumerate(batch)
    ]
