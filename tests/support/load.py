"""Clients that ask a server without a pause, and what they were told."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2


@dataclass(frozen=True)
class Told:
    """An answer: about which image, when asked and told, and what; a proxy's own is no document."""

    image: int
    asked: float
    told: float
    status: int
    headers: httpx2.Headers
    document: dict[str, Any]


@dataclass
class Load:
    """Clients with a connection each; a client ends when it gets no answer, or at the end of the context.

    Attributes:
        told: all answers.
        failed: when and why clients got none.
    """

    url: str
    images: list[bytes]
    clients: int = 4
    told: list[Told] = field(default_factory=list)
    failed: list[tuple[float, httpx2.TransportError]] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def wait(self, more: int, timeout_s: float = 60) -> None:
        """Until so many more answers have come."""
        until, deadline = len(self.told) + more, time.monotonic() + timeout_s
        while len(self.told) < until:
            assert time.monotonic() < deadline, f"{until - len(self.told)} of {more} answers have not come"
            time.sleep(0.005)

    def _ask(self, number: int) -> None:
        with httpx2.Client(timeout=60) as client:
            while not self._stopping.is_set():
                image, asked = number % len(self.images), time.monotonic()
                try:
                    response = client.post(self.url, content=self.images[image])
                except httpx2.TransportError as error:
                    self.failed.append((time.monotonic(), error))
                    return
                at = time.monotonic()
                document = response.json() if "json" in response.headers.get("content-type", "") else {}
                self.told.append(Told(image, asked, at, response.status_code, response.headers, document))
                number += 1
