"""Dynamic batching: one forward pass for the images of many requests, in shapes that keep the result bits."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from addenda.combined import TaskLogits
from addenda.exceptions import DeadlineError, OverloadedError
from addenda.serving.snapshot import Snapshot

Report = Callable[[int, float], None]
"""Called after each forward pass with its number of images and its seconds."""


@dataclass(eq=False)
class _Chunk:
    """Queued images of one request, at most a micro-batch."""

    snapshot: Snapshot
    images: Sequence[Tensor]
    tasks: tuple[str, ...]
    features: bool
    deadline: float
    result: asyncio.Future[TaskLogits] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Computes queued images in order of arrival, in forward passes of up to a micro-batch.

    There is no batching delay: the next batch fills up while a forward pass runs. Results do not depend on the rest of
    the batch, since the model pads every batch to a shape that its self-test has verified. Create, use and close it on
    one event loop.
    """

    def __init__(self, max_waiting: int, report: Report = lambda images, seconds: None) -> None:
        self.max_waiting, self.num_waiting = max_waiting, 0  # images queued or being computed
        self._report = report
        self._queue: deque[_Chunk] = deque()
        self._filled = asyncio.Event()
        self._seconds_per_image = 0.01
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
        if self.num_waiting + num_images > self.max_waiting:
            seconds = math.ceil(self.num_waiting * self._seconds_per_image)
            raise OverloadedError(
                f"The queue is full: this request has {num_images} images, {self.num_waiting} of at most "
                f"{self.max_waiting} are queued (--max-waiting).",
                min(max(1, seconds), 60),
            )
        self.num_waiting += num_images
        try:
            yield
        finally:
            self.num_waiting -= num_images

    async def predict(
        self,
        snapshot: Snapshot,
        images: Iterable[Float[Tensor, "3 H W"]],
        tasks: Sequence[str],
        deadline: float = math.inf,
        features: bool = False,
    ) -> TaskLogits:
        """Computes the logits of tasks of one snapshot; cancelling the call removes its images from the queue.

        `deadline` is a time of the event loop's clock; `features` also returns the backbone's features.
        """
        pixels, size = list(images), snapshot.model.micro_batch
        chunks = [
            _Chunk(snapshot, pixels[start : start + size], tuple(tasks), features, deadline)
            for start in range(0, len(pixels), size)
        ]
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
        parts = [result.features for result in results if result.features is not None]
        return TaskLogits(logits, results[0].exact, torch.cat(parts) if features else None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._filled.wait()
            batch = self._next(loop.time())
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
            self._seconds_per_image += (seconds / num_images - self._seconds_per_image) / 10
            self._report(num_images, seconds)
            for chunk, result in zip(batch, results, strict=True):
                if not chunk.result.done():
                    chunk.result.set_result(result)

    def _next(self, now: float) -> list[_Chunk]:
        """Dequeues the next batch: the oldest chunks of one snapshot; drops cancelled and expired ones."""
        batch: list[_Chunk] = []
        count = 0
        while self._queue:
            chunk = self._queue[0]
            if chunk.deadline < now and not chunk.result.done():
                chunk.result.set_exception(DeadlineError("The request timed out in the queue."))
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
