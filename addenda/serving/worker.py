"""A worker process: it accepts connections and prepares images; what needs the model or the registry it relays."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI
from starlette.datastructures import QueryParams
from starlette.middleware import Middleware
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from addenda.backbones import ImageInput
from addenda.serving import api, inference
from addenda.serving.channel import Channel, Kind, Message
from addenda.serving.keys import KeyFile
from addenda.serving.relay import relay
from addenda.serving.remote import RemoteBatcher, RemoteService
from addenda.serving.routes import HANDLERS
from addenda.serving.server import CONNECTIONS, ConnectionServer, StrictProtocol, log_as_json
from addenda.serving.shared import Board, Quota, pixel_slots
from addenda.serving.supervisor import SETTINGS, WorkerSettings
from addenda.serving.telemetry import Telemetry

ENDPOINTS = (api.predict, inference.infer, inference.version_infer)
"""What a worker answers itself: the requests with images."""

log = logging.getLogger(__name__)


class Worker:
    """The ASGI application of a worker."""

    def __init__(self, number: int, descriptors: tuple[int, ...], settings: WorkerSettings) -> None:
        listening, channel, relayed, pixels, memory = descriptors
        self._channel_end, self._relayed = socket.socket(fileno=channel), socket.socket(fileno=relayed)
        self._relayed.setblocking(False)
        self._pixels = pixel_slots(pixels, settings.shape)
        self._settings, board = settings, Board(memory, settings.workers)
        self._app = app = FastAPI(
            lifespan=self._lifespan, exception_handlers=HANDLERS, middleware=[Middleware(Telemetry, count=self.count)]
        )
        self._routes = [r for module in (api, inference) for r in module.router.routes if r.endpoint in ENDPOINTS]
        assert len(self._routes) == len(ENDPOINTS), "an endpoint of another module: add the module above"
        app.router.routes[:] = self._routes
        app.state.keys, app.state.loopback, app.state.draining = KeyFile(settings.keys), settings.loopback, False
        app.state.keys.share(board.cells("key_file_existed"), number)
        app.state.bodies = Quota(settings.limits.bodies_bytes, board.cells("body_bytes"), number)
        self._waiting = Quota(settings.limits.waiting_images, board.cells("images"), number)
        connections = Quota(CONNECTIONS, board.cells("connections"), number)
        self.server = WorkerServer(self, socket.socket(fileno=listening), connections, settings.stop_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request, or lets the model's process handle it."""
        if scope["type"] != "http" or self._answers(scope):
            await self._app(scope, receive, send)
        else:
            await relay(self._relayed, scope, receive, send)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Records a request in the metrics of the server."""
        self._channel.send(Message(Kind.COUNT, payload=json.dumps([method, route, status, seconds]).encode()))

    def accepts(self) -> None:
        """Says that it serves the first snapshot."""
        self._channel.send(Message(Kind.SERVING, value=self._first.value))

    def _answers(self, scope: Scope) -> bool:
        if QueryParams(scope["query_string"]).get("task") == api.AUTO:
            return False
        matches = (route.matches(scope) for route in self._routes)
        models = [child["path_params"].get("model") for match, child in matches if match is Match.FULL]
        return bool(models) and models[0] != inference.FEATURES

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Begins with the first snapshot."""
        self._channel = channel = await Channel.over(self._channel_end)
        batcher = RemoteBatcher(channel, self._pixels, self._waiting)
        backbone = ImageInput(self._settings.backbone, self._settings.preprocessing)
        self._service = app.state.service = RemoteService(backbone, batcher, self._settings.limits)
        channel.send(Message(Kind.HELLO, os.getpid()))
        first = await channel.receive()
        if first is None:
            os._exit(1)
        self._first = first
        self._service.serve(first, channel)
        reading = asyncio.ensure_future(self._read(batcher))
        yield
        reading.cancel()
        await self._service.close()

    async def _read(self, batcher: RemoteBatcher) -> None:
        while (message := await self._channel.receive()) is not None:
            match message.kind:
                case Kind.SNAPSHOT:
                    self._service.serve(message, self._channel)
                    self._channel.send(Message(Kind.SERVING, value=message.value))
                case Kind.STOP:
                    self.server.should_exit = True
                case _:
                    batcher.receive(message)
        os._exit(1)  # the model's process has ended


class WorkerServer(ConnectionServer):
    """Serves the connections that it accepts on a socket which all workers share."""

    def __init__(self, worker: Worker, listening: socket.socket, connections: Quota, stop_s: int) -> None:
        super().__init__(worker, stop_s, _protocol(connections))
        self._worker, self._listening = worker, listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts connections from now on."""
        await super().startup([])
        self._listen()
        self._worker.accepts()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts no more connections and completes pending requests."""
        asyncio.get_running_loop().remove_reader(self._listening)
        self._listening.close()
        await super().shutdown([])

    def _listen(self) -> None:
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        """Accepts one connection; asyncio would accept all that wait, and other workers none of them."""
        try:
            accepted, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):  # another worker was faster, or the client has gone
            return
        except OSError as error:  # such as too many open files
            log.error("Cannot accept connections for a second: %s", error)
            asyncio.get_running_loop().remove_reader(self._listening)
            asyncio.get_running_loop().call_later(1, self._listen)
            return
        self.serve_connection(accepted)


def _protocol(connections: Quota) -> type[StrictProtocol]:
    """The protocol of a worker's connections, which rejects requests while all workers have too many."""

    class CountedProtocol(StrictProtocol):
        def connection_made(self, transport: Any) -> None:
            connections.add(1)
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            connections.give(1)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self.limit_concurrency = connections.limit - connections.others
            super().data_received(data)

    return CountedProtocol


def fork_workers(control: socket.socket, settings: WorkerSettings) -> None:
    """Forks a worker for each number received, with its descriptors, until the other end closes.

    Its workers start at once, and share the memory of all imported modules. It starts no thread itself.
    """
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 5)
        if not data:
            return
        if os.fork() == 0:
            control.close()
            code = 1
            try:
                torch.set_num_threads(1)
                log_as_json(settings.log_level)
                logging.getLogger("uvicorn").setLevel("WARNING")  # the model's process says when the server starts
                Worker(data[0], tuple(descriptors), settings).server.run()
                code = 0
            except Exception:
                log.exception("Worker %d failed", data[0])
            finally:
                os._exit(code)
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):  # the model's process decides; nobody waits
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as end:
        fork_workers(end, SETTINGS.validate_json(sys.argv[2]))
