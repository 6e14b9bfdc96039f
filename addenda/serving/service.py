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
from addenda.combined import Choice, Router, Verdict, attention_map, can_be_routed, feature_tasks, not_finite, verdicts
from addenda.exceptions import DataError, DeadlineError, OverloadedError, RegistryError, TooLargeError, UnknownTaskError
from addenda.registry import Registry, is_finite
from addenda.serving.content_cache import ContentCache, content_keys, widths_of
from addenda.serving.model_thread import ModelThread
from addenda.serving.outputs import Outputs, Wanted, joined
from addenda.serving.shared import Quota
from addenda.serving.snapshot import Follower, Snapshot

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_DECODERS = 4
"""Maximum number of images that are decoded at a time."""
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
    cache_bytes: int = 0  # of cached outputs; 0: nothing is cached


Images = Sequence[bytes] | Float[Tensor, "B 3 H W"]
"""Encoded image files, or preprocessed images."""


@dataclass(frozen=True, eq=False)
class ServedPrediction:
    """Predictions for a request's images from one snapshot, and the router's choice for each image if it was used."""

    snapshot: Snapshot
    logits: Outputs  # or features
    choices: list[Choice] | None = None


class Service:
    """Predicts with the current tasks of a registry. Create it on the event loop that uses it.

    It closes the thread of the model, by default a new one.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        registry: Registry,
        alias: str | None = None,
        limits: Limits | None = None,
        model_thread: ModelThread | None = None,
    ) -> None:
        self.backbone, self.registry, self.alias = backbone, registry, alias
        self.limits = limits or Limits()
        self._model_thread = model_thread or ModelThread()
        self.follower = Follower(backbone, registry, alias, self._model_thread.background)
        self.batcher = Batcher(self.limits.waiting_images, self._model_thread)
        self.cache = ContentCache(self.limits.cache_bytes) if self.limits.cache_bytes else None
        self._decoders = decoders()
        self._router_of, self._routing = lru_cache(maxsize=1)(self._make_router), asyncio.Lock()

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot served now."""
        return self.follower.snapshot

    async def close(self) -> None:
        """Stops all threads."""
        await self.batcher.close()
        await asyncio.to_thread(self.follower.stop)
        await asyncio.to_thread(self._model_thread.close)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def predict(
        self,
        images: Images,
        tasks: Sequence[str] | None = None,
        timeout_s: float | None = None,
        snapshot: Snapshot | None = None,
        tag: str | None = None,
    ) -> ServedPrediction:
        """Predicts for images with the tasks that `Snapshot.select` selects, by default all."""
        snapshot = snapshot or self.snapshot
        names = snapshot.select(tasks, tag)
        logits = await self._predict(snapshot, images, Wanted(names), timeout_s)
        if not (logits.matrix.abs() < SMALL).all():  # NaN fails this too; one check covers all tasks
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
        async with self._reserve(len(images), timeout_s):
            async with self._routing:
                router = await asyncio.to_thread(self._router_of, snapshot)
            logits = await self._compute(snapshot, images, Wanted(router.tasks, features=True))
            assert logits.features is not None
            choices = await asyncio.wrap_future(self._model_thread.run(router.choose, logits.features))
        return ServedPrediction(snapshot, logits, choices)

    async def embed(
        self, images: Images, features: Sequence[str], timeout_s: float | None = None, snapshot: Snapshot | None = None
    ) -> ServedPrediction:
        """Computes features of images, named as in `CombinedModel.embed`."""
        snapshot = snapshot or self.snapshot
        for task in feature_tasks(features, self.backbone):
            if task not in snapshot.records:
                raise UnknownTaskError(f"Task {task[:100]!r} {snapshot.absence(task)}")
        embedded = await self._predict(snapshot, images, Wanted(tuple(dict.fromkeys(features)), embed=True), timeout_s)
        if not embedded.matrix.isfinite().all():
            raise DataError("These images give features that are not finite. Check their pixel values.")
        return ServedPrediction(snapshot, embedded)

    async def attention(
        self, image: bytes, task: str
    ) -> tuple[Snapshot, Float[Tensor, "rows columns"], tuple[int, int]]:
        """The attention of a task's class token over an image's patches, and the image's size."""
        snapshot, loop = self.snapshot, asyncio.get_running_loop()
        if task not in snapshot.records:
            raise UnknownTaskError(f"Task {task[:100]!r} {snapshot.absence(task)}")
        async with self._reserve(1):
            pixels, size = await loop.run_in_executor(self._decoders, self._decode, 0, image)
            arguments = self.backbone, snapshot.model.tasks[task], pixels.unsqueeze(0)
            weights = await asyncio.wrap_future(self._model_thread.run(attention_map, *arguments))
        return snapshot, weights[0], size

    def verify(self) -> tuple[Snapshot, list[Verdict]]:
        """Recomputes golden probes on the served model. Blocks the calling thread."""
        snapshot = self.snapshot
        served = snapshot.model.tasks.values()
        self.backbone.check_unchanged()
        recorded = [(task, self.registry.goldens(task.ref)) for task in served]
        return snapshot, self._model_thread.background(verdicts, snapshot.model, recorded)

    async def _predict(self, snapshot: Snapshot, images: Images, wanted: Wanted, timeout_s: float | None) -> Outputs:
        async with self._reserve(len(images), timeout_s):
            if isinstance(images, Tensor):
                self.backbone.check_images(images)
                return await self.batcher.predict(snapshot, images, wanted)
            return await self._compute(snapshot, images, wanted)

    async def _compute(self, snapshot: Snapshot, images: Sequence[bytes], wanted: Wanted) -> Outputs:
        """The outputs for image files, which are decoded unless their outputs are cached."""
        loop = asyncio.get_running_loop()

        async def compute(numbers: Sequence[int]) -> Outputs:
            decoding = [loop.run_in_executor(self._decoders, self._decode, i, images[i]) for i in numbers]
            pixels = [decoded for decoded, _ in await asyncio.gather(*decoding)]
            return await self.batcher.predict(snapshot, pixels, wanted)

        if self.cache is None:
            return await compute(range(len(images)))
        keys = await loop.run_in_executor(self._decoders, content_keys, images, snapshot, wanted)
        return await self.cache.outputs(keys, widths_of(snapshot, wanted), compute)

    @asynccontextmanager
    async def _reserve(self, num_images: int, timeout_s: float | None = None) -> AsyncIterator[None]:
        """Reserves queue capacity and enforces the timeout, which cancels queued images too."""
        if not 0 < num_images <= self.limits.images:
            raise DataError(
                f"A request may have 1 to {self.limits.images} images; this one has {num_images}. Divide it."
            )
        if num_images > (limit := self.limits.waiting_images):
            raise TooLargeError(
                f"This request has {num_images} images; the queue holds at most {limit} (--max-waiting). Divide it."
            )
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
        return Router(routable)  # not on the model's thread, where requests would wait for seconds


def decoders() -> ThreadPoolExecutor:
    """Threads that decode images, each of which may take hundreds of megabytes meanwhile."""
    return ThreadPoolExecutor(min(MAX_DECODERS, os.cpu_count() or 1), thread_name_prefix="addenda-decoder")


@dataclass(eq=False)
class _Chunk:
    """Queued images of one request, at most a micro-batch."""

    snapshot: Snapshot
    images: Sequence[Tensor]
    wanted: Wanted
    result: asyncio.Future[Outputs] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Computes queued images in order of arrival, in forward passes of up to a micro-batch.

    There is no batching delay: the next batch fills up while a forward pass runs. Results do not depend on the rest of
    the batch, since the model pads every batch to a shape that its self-test has verified. Create, use and close it on
    one event loop.
    """

    def __init__(self, max_waiting: int, model_thread: ModelThread) -> None:
        self.waiting, self._num_pending = Quota(max_waiting), 0  # images queued or being computed
        self._model_thread = model_thread
        self.report: Callable[[int, float], None] = lambda images, seconds: None  # called after each forward pass
        self._queue: deque[_Chunk] = deque()
        self._filled = asyncio.Event()
        self.seconds_per_image = 0.01
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Cancels queued work."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for chunk in self._queue:
            chunk.result.cancel()

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
            with self._pending(num_images):
                yield
        finally:
            self.waiting.give(num_images)

    @property
    def num_waiting(self) -> int:
        """Images queued or being computed."""
        return self.waiting.used

    @contextmanager
    def _pending(self, num_images: int) -> Iterator[None]:
        """Makes background work give way to images."""
        self._num_pending += num_images
        self._model_thread.report(self._num_pending)
        try:
            yield
        finally:
            self._num_pending -= num_images
            self._model_thread.report(self._num_pending)

    async def predict(self, snapshot: Snapshot, images: Iterable[Float[Tensor, "3 H W"]], wanted: Wanted) -> Outputs:
        """Computes what is wanted of one snapshot; cancelling the call removes its images from the queue."""
        pixels, size = list(images), snapshot.model.micro_batch
        parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        chunks = [_Chunk(snapshot, part, wanted) for part in parts]
        self._queue += chunks
        self._filled.set()
        try:
            with self._pending(len(pixels)):
                return joined(await asyncio.gather(*(chunk.result for chunk in chunks)))
        finally:
            for chunk in chunks:
                chunk.result.cancel()

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
                results = await asyncio.wrap_future(self._model_thread.run(_compute, batch))
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
        """Dequeues the next batch: the oldest chunks of one kind and snapshot; drops cancelled ones."""
        batch: list[_Chunk] = []
        count = 0
        while self._queue:
            chunk = self._queue[0]
            if chunk.result.done():
                self._queue.popleft()
                continue
            if batch and (
                (chunk.snapshot, chunk.wanted.embed) != (batch[0].snapshot, batch[0].wanted.embed)
                or count + len(chunk.images) > chunk.snapshot.model.micro_batch
            ):
                break
            count += len(chunk.images)
            batch.append(self._queue.popleft())
        return batch


def _compute(batch: Sequence[_Chunk]) -> list[Outputs]:
    """Runs one forward pass for all that any chunk requests, and splits the result by chunk."""
    requested = dict.fromkeys(name for chunk in batch for name in chunk.wanted.names)
    model = batch[0].snapshot.model
    images = torch.stack([image for chunk in batch for image in chunk.images])
    if batch[0].wanted.embed:
        whole = Outputs.of(len(images), model.embed(images, list(requested)), model.exact)
    else:
        tasks = [name for name in model.tasks if name in requested]
        result = model(images, tasks, any(chunk.wanted.features for chunk in batch))
        whole = Outputs.of(len(images), result, result.exact, result.features)
    rows = whole.split([len(chunk.images) for chunk in batch])
    return [part.select(chunk.wanted) for part, chunk in zip(rows, batch, strict=True)]
