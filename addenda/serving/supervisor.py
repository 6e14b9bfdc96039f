"""Starts a server's workers, and replaces those that end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from addenda.exceptions import AddendaError
from addenda.serving.channel import Channel
from addenda.serving.link import Link
from addenda.serving.service import Limits, Service
from addenda.serving.shared import Board, Quota, pixel_bytes, pixel_slots, shared_memory
from addenda.serving.snapshot import Snapshot

PUBLISH_S = 10
"""Seconds within which a worker must serve a new snapshot; then it is replaced."""
RESTART_S = 1
"""Seconds between two starts of a worker, at least."""
END_S = 5
"""Seconds that workers may take to end, beyond the time that their pending requests have."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of every worker of a server."""

    workers: int  # how many there are
    backbone: str  # the backbone's name
    preprocessing: dict[str, Any]  # of its images
    limits: Limits
    keys: str  # path of the key file
    loopback: bool  # whether the server serves this machine only
    log_level: str
    stop_s: int  # seconds that pending requests may take when the server stops

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a preprocessed image."""
        return tuple(self.preprocessing["input_size"])


SETTINGS = TypeAdapter(WorkerSettings)


class Supervisor:
    """The workers of a server, which accept the connections to `listening`; a context manager.

    A worker that ends is replaced, and its connections are closed. If this process ends, so do they all.
    """

    def __init__(self, app: FastAPI, settings: WorkerSettings, listening: socket.socket) -> None:
        self._app, self._settings, self._listening = app, settings, listening
        listening.setblocking(False)
        self._memory = shared_memory(Board.num_bytes(settings.workers))
        self._board = Board(self._memory, settings.workers)
        self._snapshots, self._stopping = count(1), False
        self._links: dict[int, Link] = {}
        self._watching: list[asyncio.Task[None]] = []

    def __enter__(self) -> Supervisor:
        self._start_forking()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends all processes."""
        for link in self._links.values():
            link.kill()
        self._control.close()
        self._forking.wait()
        os.close(self._memory)

    async def start(self, service: Service, serve_connection: Callable[[socket.socket], None]) -> None:
        """Starts the workers, and returns once all of them accept connections; AddendaError if one did not start.

        The service computes what they ask for, and `serve_connection` serves what they relay.
        """
        state, cells = self._app.state, self._board.cells
        service.batcher.waiting = Quota(service.limits.waiting_images, cells("images"))
        state.bodies = Quota(service.limits.bodies_bytes, cells("body_bytes"))
        state.keys.share(cells("key_file_existed"), 0)
        self._service, self._serve_connection, self._loop = service, serve_connection, asyncio.get_running_loop()
        self._newest = next(self._snapshots), service.follower.subscribe(self._publish)
        links = [await self._start_worker(number) for number in range(1, self._settings.workers + 1)]
        await asyncio.wait([link.serving for link in links])
        if any(link.ended.done() for link in links):
            raise AddendaError("A worker process ended while it started. The server's log says why.")
        self._watching = [asyncio.ensure_future(self._watch(link)) for link in links]

    async def stop(self) -> None:
        """Completes the workers' pending requests, and ends them."""
        self._stopping = True
        for link in self._links.values():
            link.stop()
        if self._watching:
            await asyncio.wait(self._watching, timeout=self._settings.stop_s + END_S)

    def _start_forking(self) -> None:
        """Starts the process that forks workers, with all that they import."""
        self._control, control = socket.socketpair()
        with control:
            settings = SETTINGS.dump_json(self._settings).decode()
            command = [sys.executable, "-m", "addenda.serving.worker", str(control.fileno()), settings]
            self._forking = subprocess.Popen(command, pass_fds=[control.fileno()])

    async def _start_worker(self, number: int) -> Link:
        if self._forking.poll() is not None:
            self._control.close()
            self._start_forking()
        shape, slots = self._settings.shape, self._service.limits.waiting_images
        (channel, its_channel), (relayed, its_relayed) = socket.socketpair(), socket.socketpair()
        pixels = shared_memory(pixel_bytes(slots, shape))
        with its_channel, its_relayed:
            descriptors = self._listening.fileno(), its_channel.fileno(), its_relayed.fileno(), pixels, self._memory
            socket.send_fds(self._control, [bytes([number])], descriptors)
        self._links[number] = link = Link(
            number, await Channel.over(channel), relayed, pixel_slots(pixels, shape), self._service.batcher,
            lambda: self._newest, self._app.state.metrics.count, self._serve_connection,
        )  # fmt: skip
        os.close(pixels)
        return link

    async def _watch(self, link: Link) -> None:
        """Replaces a worker whenever it ends."""
        while True:
            started = time.monotonic()
            await link.ended
            self._board.clear(link.number)
            if not self._stopping:
                log.error("Worker %d ended, and so its connections; another one is started", link.number)
                await asyncio.sleep(max(0, RESTART_S - (time.monotonic() - started)))
            if self._stopping:
                return
            link = await self._start_worker(link.number)

    def _publish(self, snapshot: Snapshot) -> None:
        """Returns once every worker serves the snapshot. Blocks the calling thread."""
        asyncio.run_coroutine_threadsafe(self._show(snapshot), self._loop).result()

    async def _show(self, snapshot: Snapshot) -> None:
        self._newest = next(self._snapshots), snapshot
        shown = {link: link.show(*self._newest) for link in self._links.values() if link.responds}
        if shown:
            await asyncio.wait(shown.values(), timeout=PUBLISH_S)
        for link, serving in shown.items():
            if not serving.done():
                log.error("Worker %d does not respond", link.number)
                link.kill()
