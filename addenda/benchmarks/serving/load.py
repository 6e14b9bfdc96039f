"""A process that loads a server over HTTP/1.1, and measures; it imports nothing that is slow, and computes nothing."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle

MAX_CONNECTIONS = 200
TIMEOUT_S = 60


@dataclass
class Measured:
    """What came of a load."""

    seconds: float = 0
    latencies_s: list[float] = field(default_factory=list)  # of what got 200; in an open loop from when it was due
    failed: Counter[str] = field(default_factory=Counter)  # all else, by status or error
    lag_s: float = 0  # the latest that a request was sent after it was due: a large one is the generator's fault

    @property
    def rate(self) -> float:
        """Requests a second that were answered with 200."""
        return len(self.latencies_s) / self.seconds


async def load(
    host: str, port: int, requests: Sequence[bytes], seconds: float, clients: int = 0, rate: float = 0, seed: int = 0
) -> Measured:
    """Sends requests in turn, on connections that stay open, in a closed or an open loop.

    Either so many clients ask again as soon as they are answered; or requests are sent at the times of a Poisson
    process of a rate, whether those before are answered or not.
    """
    measured, turn, dice = Measured(), cycle(requests), random.Random(seed)
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    places = asyncio.Semaphore(MAX_CONNECTIONS)

    async def ask(due: float) -> None:
        request = next(turn)
        try:
            async with places, asyncio.timeout(TIMEOUT_S):
                connection = free.pop() if free else await asyncio.open_connection(host, port)
                status = await _exchange(*connection, request)
                free.append(connection)
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            measured.failed[type(error).__name__] += 1
            return
        if status == 200:
            measured.latencies_s.append(time.perf_counter() - due)
        else:
            measured.failed[str(status)] += 1

    async def client() -> None:
        while (now := time.perf_counter()) < start + seconds:
            await ask(now)

    async def arrive() -> None:
        due, asked = start, []
        while (due := due + dice.expovariate(rate)) < start + seconds:
            await asyncio.sleep(max(0, due - time.perf_counter()))
            measured.lag_s = max(measured.lag_s, time.perf_counter() - due)
            asked.append(asyncio.ensure_future(ask(due)))
        await asyncio.gather(*asked)

    start = time.perf_counter()
    await (arrive() if rate else asyncio.gather(*(client() for _ in range(clients))))
    measured.seconds = time.perf_counter() - start
    for _, writer in free:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return measured


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
    """Sends a request and reads the whole answer; gives its status."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
    await reader.readexactly(int(length))
    return int(head.split(maxsplit=2)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)
        order["requests"] = [bytes.fromhex(request) for request in order["requests"]]
        print(json.dumps(vars(asyncio.run(load(**order)))), flush=True)
