"""Waiting until something is so, and doing something as soon as it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def until(true: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"Not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


@contextmanager
def meanwhile(moment: Callable[[], bool], do: Callable[[], None]) -> Iterator[None]:
    """Does something on another thread as soon as something is so, if that comes before what is within ends."""
    over = threading.Event()

    def wait() -> None:
        while not over.wait(0.005):
            if moment():
                do()
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
