"""Clients that send requests to a server without pause, and the responses."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2


@dataclass(frozen=True)
class Told:
    """A response: index of the image, times of request and response; the document is empty for a proxy's response."""

    image: int
    asked: float
    told: float
    status: int
    headers: httpx2.Headers
    document: dict[str, Any]


@dataclass
class Load:
    """Clients with one connection each; a client ends when it gets no response, or at the end of the context.

    Attributes:
        told: all responses.
        failed: times and errors of requests without a response.
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

    def wait(self, more: int, timeout_s: float = 180) -> None:
        """Waits until that many more responses have arrived."""
        total, deadline = len(self.told) + more, time.monotonic() + timeout_s
        while len(self.told) < total:
            assert time.monotonic() < deadline, f"{total - len(self.told)} of {more} responses are missing"
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
                received = time.monotonic()
                document = response.json() if "json" in response.headers.get("content-type", "") else {}
                self.told.append(Told(image, asked, received, response.status_code, response.headers, document))
                number += 1
