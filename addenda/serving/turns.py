"""Turns of the model: background work runs in slices between the forward passes of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock

PATIENCE_S = 0.05
"""Seconds that a slice waits for a moment without requests; then it takes the turn after the current forward pass."""


class Turns:
    """Lets one thread at a time run the model, so that threads of two forward passes never compete for the cores."""

    def __init__(self) -> None:
        self._model, self._idle = Lock(), Event()
        self._idle.set()

    def report(self, num_waiting: int) -> None:
        """Records how many images are queued or being computed."""
        (self._idle.clear if num_waiting else self._idle.set)()

    @contextmanager
    def request(self) -> Iterator[None]:
        """A turn for a forward pass of requests, which waits for one slice at most."""
        with self._model:
            yield

    @contextmanager
    def background(self) -> Iterator[Callable[[], None]]:
        """Turns for background work, which gives way to requests whenever it calls the function that this yields."""
        self._take()
        try:
            yield self._give_way
        finally:
            self._model.release()

    def _give_way(self) -> None:
        self._model.release()
        self._take()

    def _take(self) -> None:
        self._idle.wait(PATIENCE_S)
        self._model.acquire()
