"""The load generator: a process that sends HTTP/1.1 requests and measures latencies; it avoids slow imports."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from statistics import linear_regression

MAX_CONNECTIONS = 200
TIMEOUT_S = 60
KEEP_S = 2
"""Seconds after which an idle connection is not used again; servers close it after a few."""


@dataclass
class Measured:
    """The result of a load."""

    rate: float = 0  # successful requests (status 200) per second; in a closed loop once every client has a response
    latencies_s: list[float] = field(default_factory=list)  # of responses with 200; in an open loop since the due time
    failed: Counter[str] = field(default_factory=Counter)  # all other requests, by status or error
    lag_s: float = 0  # largest delay between due time and sending; if large, the generator was too slow


async def load(
    host: str, port: int, requests: Sequence[bytes], seconds: float, clients: int = 0, rate: float = 0, seed: int = 0
) -> Measured:
    """Sends the requests in rotation over keep-alive connections, in a closed or an open loop.

    Closed loop (`clients`): each client sends its next request when it has received a response. Open loop (`rate`):
    requests are sent at the times of a Poisson process, whether or not earlier ones have been answered.
    """
    measured, rotation, noise = Measured(), cycle(requests), random.Random(seed)
    answered: list[float] = []  # times of responses with 200
    free: list[tuple[float, tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = []  # with the time of their last use
    connections = asyncio.Semaphore(MAX_CONNECTIONS)

    async def connected() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while free:
            used, connection = free.pop()
            if time.perf_counter() <= used + KEEP_S:
                return connection
            connection[1].close()
        return await asyncio.open_connection(host, port)

    async def send(due: float) -> None:
        request = next(rotation)
        try:
            async with connections, asyncio.timeout(TIMEOUT_S):
                connection = await connected()
                status = await _exchange(*connection, request)
                free.append((time.perf_counter(), connection))
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            measured.failed[type(error).__name__] += 1
            return
        if status == 200:
            answered.append(time.perf_counter())
            measured.latencies_s.append(answered[-1] - due)
        else:
            measured.failed[str(status)] += 1

    async def client() -> None:
        while (now := time.perf_counter()) < start + seconds:
            await send(now)

    async def arrivals() -> None:
        due, sent = start, []
        while (due := due + noise.expovariate(rate)) < start + seconds:
            await asyncio.sleep(max(0, due - time.perf_counter()))
            measured.lag_s = max(measured.lag_s, time.perf_counter() - due)
            sent.append(asyncio.ensure_future(send(due)))
        await asyncio.gather(*sent)

    start = time.perf_counter()
    await (arrivals() if rate else asyncio.gather(*(client() for _ in range(clients))))
    measured.rate = len(answered) / (time.perf_counter() - start)
    full = [moment for moment in answered[clients:] if moment < start + seconds]  # neither filling nor emptying
    if clients and len(full) > clients:
        measured.rate = linear_regression(full, range(len(full))).slope
    for _, (_, writer) in free:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return measured


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
    """Sends a request, reads the complete response and returns its status."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
    await reader.readexactly(int(length))
    return int(head.split(maxsplit=2)[1])


def pin(process: int, cores: Collection[int]) -> None:
    """Keeps a process that has just started, and so all its threads, on some cores, if there are any."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process, cores)


@contextmanager
def generator(images: Sequence[bytes], cores: Collection[int] = ()) -> Iterator[Callable[..., Measured]]:
    """Starts the load generator, on some cores if they are given.

    Yields a function of a server's host and port and the options of `load`.
    """
    command = (sys.executable, "-m", "addenda.benchmarks.serving.load")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pin(process.pid, cores)
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def load(host: str, port: int, **options: float) -> Measured:
            head = f"POST /api/v1/predict HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: image/jpeg\r\n"
            requests = [f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image for image in images]
            order = {"host": host, "port": port, "requests": [request.hex() for request in requests], **options}
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
            return Measured(**json.loads(stdout.readline()))

        yield load
        stdin.close()


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)
        order["requests"] = [bytes.fromhex(request) for request in order["requests"]]
        print(json.dumps(vars(asyncio.run(load(**order)))), flush=True)
