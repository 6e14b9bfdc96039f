"""Running the application: signals, slow clients, and stopping without losing a request."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from prometheus_client import start_http_server
from uvicorn.protocols.http.h11_impl import H11Protocol

from addenda.exceptions import AddendaError
from addenda.serving.telemetry import JsonLines

HEAD_S = 10
"""Seconds in which a connection must send a request's head, from its first byte on."""
READ_S, READ_BYTES = 20, 2**16
"""Seconds between looks at what waits to be sent, and bytes that a client must have read meanwhile, or all."""
CONNECTIONS = 256
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(3)."""

log = logging.getLogger(__name__)


class _Protocol(H11Protocol):
    """HTTP/1.1 that hangs up on who sends a request's head, or the rest of a refused body, too slowly.

    And on who does not read an answer: what waits to be sent must get less from one look to the next.
    """

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch()

    def _watch_reader(self, before: int | None = None) -> None:
        """Looks again and again at what waits to be sent; `before`: bytes that waited at the last look."""
        waiting = self.transport.get_write_buffer_size()
        if before is None and self._unread is not None:
            return
        self._unread = None
        if before is not None and waiting and waiting > before - READ_BYTES:
            self.transport.abort()
        elif waiting:
            self._unread = self.loop.call_later(READ_S, self._watch_reader, waiting)

    def _watch(self) -> None:
        """Has a time run while a head is incomplete, or a body that was answered before it had come."""
        refused = self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY
        waiting = (refused or self.conn.their_state is h11.IDLE) and not self.transport.is_closing()
        if waiting and self._late is None:
            self._late = self.loop.call_later(HEAD_S, self.transport.close)
        elif not waiting and self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """Runs an application until SIGTERM or SIGINT; then it drains, and ends with exit code 0.

    For `drain_s` it says that it is not ready and still answers; what it has begun may take `stop_s` after that.
    """

    def __init__(self, app: FastAPI, listening: socket.socket, drain_s: float, stop_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=stop_s,
            )
        )
        self._app, self._listening, self._drain_s = app, listening, drain_s

    def run_until_stopped(self) -> None:
        """Serves."""
        asyncio.run(self.serve([self._listening]))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drains on the first signal; a second one stops at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain, loop)
        yield

    def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._app.state.draining:
            self.should_exit = True
            return
        log.info("Stopping: not ready any more, answering for %g s", self._drain_s)
        self._app.state.draining = True
        loop.call_later(self._drain_s, setattr, self, "should_exit", True)


def keep_memory() -> None:
    """Has the C library, where it is glibc, keep for the next pass what one pass frees.

    Else it gives a model's activations back after every layer, and the system zeroes them again page by page: a tenth
    of a pass on a CPU.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_M_MMAP_THRESHOLD, 2**25)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        hint = " --port takes another." if error.errno == errno.EADDRINUSE else ""
        raise AddendaError(f"{host}:{port} cannot be listened on: {error.strerror}.{hint}") from error


def serve_metrics(app: FastAPI, host: str, port: int) -> int:
    """Answers Prometheus on a port of its own, 0 for a free one, where no key is asked for; returns the port."""
    try:
        server, _ = start_http_server(port, host, app.state.metrics.registry)
    except OSError as error:
        raise AddendaError(f"{host}:{port} cannot be listened on for --metrics-port: {error.strerror}.") from error
    return server.server_port


def log_as_json(level: str) -> None:
    """Has everything that is logged written to standard error, a JSON document on each line."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level="WARNING", force=True)
    logging.captureWarnings(True)
    threading.excepthook = lambda failed: log.error(
        "A thread ended", exc_info=(failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback)
    )
    sys.unraisablehook = lambda failed: log.error("Something was not cleaned up: %r", failed.exc_value or failed.object)
    for name in ("addenda", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
