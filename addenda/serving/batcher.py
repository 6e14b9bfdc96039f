"""The micro-batcher: images of many requests pass the model together, in the shapes that keep their bits."""

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
"""Told of each pass: its images, and the seconds that it took."""


@dataclass(eq=False)
class _Waiting:
    """Some images of one request, at most a micro-batch of them."""

    snapshot: Snapshot
    images: Sequence[Tensor]
    tasks: tuple[str, ...]
    pooled: bool
    deadline: float
    answer: asyncio.Future[TaskLogits] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Answers images in the order in which they came, as many at a time as wait, up to the micro-batch.

    Nothing waits for company: while a pass runs the next one fills up. Bits do not depend on the company, since the
    model fills every batch up to a shape that its self-test has proven. Make it, use it and close it on one event loop.
    """

    def __init__(self, max_waiting: int, report: Report = lambda images, seconds: None) -> None:
        self.max_waiting, self.num_waiting = max_waiting, 0  # images that wait or are answered at one time
        self._report = report
        self._queue: deque[_Waiting] = deque()
        self._filled = asyncio.Event()
        self._seconds_per_image = 0.01
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="addenda-model")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Ends it; who waits is cancelled."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._queue:
            waiting.answer.cancel()
        self._thread.shutdown()

    @contextmanager
    def room(self, num_images: int) -> Iterator[None]:
        """Takes a place for images from before they are decoded until they are answered."""
        if self.num_waiting + num_images > self.max_waiting:
            seconds = math.ceil(self.num_waiting * self._seconds_per_image)
            raise OverloadedError(
                f"{self.num_waiting} images wait, and {num_images} more would be over {self.max_waiting}.",
                min(max(1, seconds), 60),
            )
        self.num_waiting += num_images
        try:
            yield
        finally:
            self.num_waiting -= num_images

    async def answer(
        self,
        snapshot: Snapshot,
        images: Iterable[Float[Tensor, "3 H W"]],
        tasks: Sequence[str],
        deadline: float = math.inf,
        pooled: bool = False,
    ) -> TaskLogits:
        """Logits of some tasks, all from one snapshot, by a deadline on the event loop's clock; cancelled, it gives up.

        `pooled`: the backbone's own feature is wanted too.
        """
        some, size = list(images), snapshot.model.micro_batch
        starts = range(0, len(some), size)
        parts = [_Waiting(snapshot, some[one : one + size], tuple(tasks), pooled, deadline) for one in starts]
        self._queue += parts
        self._filled.set()
        try:
            found = await asyncio.gather(*(part.answer for part in parts))
        finally:
            for part in parts:
                part.answer.cancel()
        if len(found) == 1:
            return found[0]
        logits = {name: torch.cat([one[name] for one in found]) for name in tasks}
        features = [one.pooled for one in found if one.pooled is not None]
        return TaskLogits(logits, found[0].exact, torch.cat(features) if pooled else None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._filled.wait()
            batch = self._next(loop.time())
            if not batch:
                self._filled.clear()
                continue
            started, num_images = loop.time(), sum(len(part.images) for part in batch)
            try:
                answers = await loop.run_in_executor(self._thread, _compute, batch)
            except Exception as error:  # of one pass; the next may go well
                for part in batch:
                    if not part.answer.done():
                        part.answer.set_exception(error)
                continue
            seconds = loop.time() - started
            self._seconds_per_image += (seconds / num_images - self._seconds_per_image) / 10
            self._report(num_images, seconds)
            for part, answer in zip(batch, answers, strict=True):
                if not part.answer.done():
                    part.answer.set_result(answer)

    def _next(self, now: float) -> list[_Waiting]:
        """The oldest that wait, as many as one pass of one snapshot takes; those given up or too late are dropped."""
        batch: list[_Waiting] = []
        count = 0
        while self._queue:
            part = self._queue[0]
            if part.deadline < now and not part.answer.done():
                part.answer.set_exception(DeadlineError("The time was over before the model came to these images."))
            if part.answer.done():
                self._queue.popleft()
                continue
            if batch and (
                part.snapshot is not batch[0].snapshot or count + len(part.images) > part.snapshot.model.micro_batch
            ):
                break
            count += len(part.images)
            batch.append(self._queue.popleft())
        return batch


def _compute(batch: Sequence[_Waiting]) -> list[TaskLogits]:
    """One pass: every task that any of the requests asks for, and each request's part of it."""
    wanted = {name for part in batch for name in part.tasks}
    model = batch[0].snapshot.model
    tasks = [name for name in model.tasks if name in wanted]
    images = torch.stack([image for part in batch for image in part.images])
    found = model(images, tasks, any(part.pooled for part in batch))
    sizes = [len(part.images) for part in batch]
    logits = {name: values.cpu().split(sizes) for name, values in found.items()}
    pooled = found.pooled.cpu().split(sizes) if found.pooled is not None else ()
    return [
        TaskLogits({name: logits[name][i] for name in part.tasks}, found.exact, pooled[i] if part.pooled else None)
        for i, part in enumerate(batch)
    ]
