"""Waiting for a condition, and acting as soon as it holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"Not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


@contextmanager
def meanwhile(condition: Callable[[], bool], action: Callable[[], None]) -> Iterator[None]:
    """Runs an action on another thread as soon as a condition holds, unless the context ends first."""
    over = threading.Event()

    def wait() -> None:
        while not over.wait(0.005):
            if condition():
                action()
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
