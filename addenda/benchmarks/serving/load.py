"""A process that loads a server over HTTP/1.1, and measures; it imports nothing that is slow, and computes nothing."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_CONNECTIONS = 200
TIMEOUT_S = 60


@dataclass
class Measured:
    """What came of a load.

    Attributes:
        seconds: that it took.
        latencies_s: of the requests that were answered with 200; in an open loop from when they were due.
        failed: others, by their status or their error.
        lag_s: the latest that a request was sent after it was due: what is large was the generator's fault.
    """

    seconds: float = 0
    latencies_s: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    lag_s: float = 0

    @property
    def rate(self) -> float:
        """Requests a second that were answered with 200."""
        return len(self.latencies_s) / self.seconds

    @property
    def num_failed(self) -> int:
        """How many were not."""
        return sum(self.failed.values())


class Generator:
    """Sends requests that were made before, on connections that stay open.

    Args:
        host: of the server.
        port: of the server.
        requests: whole requests, head and body, which are sent in turn.
    """

    def __init__(self, host: str, port: int, requests: list[bytes]) -> None:
        self._address, self._requests, self._sent = (host, port), requests, 0
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)

    async def closed(self, clients: int, seconds: float) -> Measured:
        """So many clients, each of which asks again when it was answered."""
        measured, end = Measured(), time.perf_counter() + seconds

        async def client() -> None:
            while (now := time.perf_counter()) < end:
                await self._ask(measured, now)

        await self._timed(measured, lambda: asyncio.gather(*(client() for _ in range(clients))))
        return measured

    async def open(self, rate: float, seconds: float, seed: int) -> Measured:
        """Requests at times of a Poisson process, whether those before are answered or not."""
        measured, dice = Measured(), random.Random(seed)

        async def arrive() -> None:
            start = due = time.perf_counter()
            asked = []
            while (due := due + dice.expovariate(rate)) < start + seconds:
                await asyncio.sleep(max(0, due - time.perf_counter()))
                measured.lag_s = max(measured.lag_s, time.perf_counter() - due)
                asked.append(asyncio.ensure_future(self._ask(measured, due)))
            await asyncio.gather(*asked)

        await self._timed(measured, arrive)
        return measured

    async def _timed(self, measured: Measured, work: Callable[[], Awaitable[Any]]) -> None:
        start = time.perf_counter()
        await work()
        measured.seconds = time.perf_counter() - start
        for _, writer in self._free:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        self._free.clear()

    async def _ask(self, measured: Measured, due: float) -> None:
        request = self._requests[self._sent % len(self._requests)]
        self._sent += 1
        try:
            async with self._places, asyncio.timeout(TIMEOUT_S):
                connection = self._free.pop() if self._free else await asyncio.open_connection(*self._address)
                status = await _exchange(*connection, request)
                self._free.append(connection)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            measured.failed[type(error).__name__] += 1
            return
        if status == 200:
            measured.latencies_s.append(time.perf_counter() - due)
        else:
            measured.failed[str(status)] += 1


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
    """Sends a request and reads the whole answer; gives its status."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
    await reader.readexactly(int(length))
    return int(head.split(maxsplit=2)[1])


async def _run(order: dict[str, Any]) -> dict[str, Any]:
    requests = [bytes.fromhex(request) for request in order["requests"]]
    generator = Generator(order["host"], order["port"], requests)
    if "rate" in order:
        return asdict(await generator.open(order["rate"], order["seconds"], order["seed"]))
    return asdict(await generator.closed(order["clients"], order["seconds"]))


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asyncio.run(_run(json.loads(line)))), flush=True)
