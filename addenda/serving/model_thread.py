"""The thread that runs the model: requests first, background work in slices between their forward passes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Condition
from typing import ParamSpec, Self, TypeVar

import torch

from addenda.combined import pausing

PATIENCE_S = 0.05
"""Seconds that a slice waits for a moment without requests; then it takes its turn after the current forward pass."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ModelThread:
    """Runs the model in one thread with several cores.

    OpenMP keeps a team of threads for each thread that has computed with several cores. With more of them than cores
    they sleep at every barrier instead of waiting for each other, and a forward pass of many small operations takes
    half as long again (docs/performance.md).

    Args:
        threads: number of torch's threads; by default that of the calling thread.
    """

    def __init__(self, threads: int | None = None) -> None:
        set_threads = torch.set_num_threads, (threads or torch.get_num_threads(),)
        self._thread = ThreadPoolExecutor(1, "addenda-model", *set_threads)
        self._changed = Condition()
        self._requests: deque[tuple[Future[object], Callable[[], object]]] = deque()
        self._num_waiting = 0
        self._thread.submit(torch.get_num_threads).result()  # returns once the number is set

    @classmethod
    def of_process(cls, threads: int | None = None) -> Self:
        """The only thread with several cores in this process: threads started later, and the calling one, have one."""
        thread = cls(threads)
        torch.set_num_threads(1)
        return thread

    def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Result]:
        """Runs a request's work in order of arrival, before background work that has not started its next slice."""
        result: Future[Result] = Future()
        with self._changed:
            self._requests.append((result, partial(function, *args, **kwargs)))  # type: ignore[arg-type]
            self._changed.notify()
        self._thread.submit(self._run_next, 0)
        return result

    def background(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Runs a function whose forward passes give way to requests after each layer; blocks the calling thread."""
        return self._thread.submit(self._in_slices, partial(function, *args, **kwargs)).result()

    def report(self, num_waiting: int) -> None:
        """Records how many images are queued or being computed."""
        with self._changed:
            self._num_waiting = num_waiting
            self._changed.notify()

    def close(self) -> None:
        """Completes all work and ends the thread."""
        self._thread.shutdown()

    def _in_slices(self, function: Callable[[], Result]) -> Result:
        self._give_way()
        with pausing(self._give_way):
            return function()

    def _give_way(self) -> None:
        """Runs the work of requests until no image waits, or for a moment."""
        end = time.monotonic() + PATIENCE_S
        while self._run_next(end - time.monotonic()) and time.monotonic() < end:
            pass

    def _run_next(self, patience_s: float) -> bool:
        """Runs a request's work, unless there is none; waits for it while images wait. Returns whether it ran."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests or not self._num_waiting, max(0, patience_s))
            if not self._requests:
                return False
            result, work = self._requests.popleft()
        if result.set_running_or_notify_cancel():
            try:
                with pausing(None):
                    result.set_result(work())
            except BaseException as error:
                result.set_exception(error)
        return True
