"""The HTTP application with all routes, and running it: signals, slow clients and graceful shutdown."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from prometheus_client import start_http_server
from starlette.middleware import Middleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from addenda import __version__
from addenda.exceptions import AddendaError
from addenda.serving import api, api_tasks, inference, page, telemetry
from addenda.serving.keys import KeyFile
from addenda.serving.routes import HANDLERS
from addenda.serving.service import Service
from addenda.serving.shared import Quota
from addenda.serving.supervisor import Supervisor
from addenda.serving.telemetry import JsonLines, ServerMetrics, Telemetry

HEAD_S = 10
"""Time limit for receiving a request's headers, in seconds from their first byte."""
READ_S, READ_BYTES = 20, 2**16
"""Seconds between checks of the write buffer, and bytes by which it must shrink each time unless it empties."""
CONNECTIONS = 256
"""Concurrent connections; uvicorn rejects more with 503."""
STOP_S = 30
"""Seconds that pending requests may take after the drain."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""

log = logging.getLogger(__name__)


def make_app(start: Callable[[], Service], keys: KeyFile, loopback: bool = True) -> FastAPI:
    """Builds the app; `start` creates its service on the event loop; `loopback`: it serves this machine only."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = start()
        app.state.bodies = Quota(service.limits.bodies_bytes)
        metrics.watch(service)
        try:
            yield
        finally:
            await service.close()

    metrics = ServerMetrics()
    app = FastAPI(
        title="Addenda",
        version=__version__,
        summary="Predictions of every task from one forward pass.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from another site
        redoc_url=None,
        exception_handlers=HANDLERS,
        middleware=[Middleware(Telemetry, count=metrics.count)],
    )
    app.state.keys, app.state.loopback, app.state.metrics, app.state.draining = keys, loopback, metrics, False
    app.state.uploads = asyncio.Semaphore(api_tasks.UPLOADS)
    app.state.verifying, app.state.verifications = threading.Lock(), deque(maxlen=100)
    app.state.registering, app.state.replies = asyncio.Lock(), {}
    for module in (telemetry, inference, api, api_tasks, page):
        app.include_router(module.router)
    app.include_router(page.plain)
    return app


class StrictProtocol(H11Protocol):
    """HTTP/1.1 that closes the connections of slow clients.

    Too slow are headers, the remaining body of a rejected request, and reading a response: the write buffer must shrink
    between two checks.
    """

    _receive_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts waiting for headers."""
        super().connection_made(transport)
        self._watch_receiving()

    def data_received(self, data: bytes) -> None:
        """Handles what has arrived."""
        super().data_received(data)
        self._watch_receiving()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops all timers."""
        for timer in (self._receive_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Starts waiting for a slow reader."""
        super().pause_writing()
        self._watch_sending()

    def _unsupported_upgrade_warning(self) -> None:
        """Logs nothing: any client may ask for WebSockets, and gets a plain response."""

    def on_response_complete(self) -> None:
        """Starts waiting for the rest of a response to be read, and of a rejected body to arrive."""
        super().on_response_complete()
        self._watch_sending()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch_receiving()

    def _watch_sending(self, previous: int | None = None) -> None:
        """Checks the write buffer repeatedly; `previous` is its size in bytes at the last check."""
        unsent = self.transport.get_write_buffer_size()
        if previous is None and self._send_timer is not None:
            return
        self._send_timer = None
        if previous is not None and unsent and unsent > previous - READ_BYTES:
            self.transport.abort()
        elif unsent:
            self._send_timer = self.loop.call_later(READ_S, self._watch_sending, unsent)

    def _watch_receiving(self) -> None:
        """Runs a timer while a request's headers, or its body after the response, are incomplete."""
        rejected = self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY
        incomplete = (rejected or self.conn.their_state is h11.IDLE) and not self.transport.is_closing()
        if incomplete and self._receive_timer is None:
            self._receive_timer = self.loop.call_later(HEAD_S, self.transport.close)
        elif not incomplete and self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None


class ConnectionServer(uvicorn.Server):
    """Serves an application on listening sockets, and on connections that others have accepted."""

    def __init__(
        self, app: Any, stop_s: int, protocol: type[StrictProtocol] = StrictProtocol, trusted: str | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=CONNECTIONS,
                forwarded_allow_ips=trusted,
                timeout_graceful_shutdown=stop_s,
            )
        )
        self._protocol, self._connecting = protocol, set[asyncio.Task[Any]]()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to whoever runs the server; uvicorn would catch them from before the start."""
        yield

    def serve_connection(self, accepted: socket.socket) -> None:
        """Serves an accepted connection; it becomes the server's."""
        accepted.setblocking(False)

        def protocol() -> StrictProtocol:
            return self._protocol(self.config, self.server_state, self.lifespan.state)

        task = asyncio.ensure_future(asyncio.get_running_loop().connect_accepted_socket(protocol, accepted))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses new connections, completes pending requests, and then ends the application."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(0.1)  # connections accepted just now are made: uvicorn closes only those that are
        await super().shutdown(sockets)


class Server(ConnectionServer):
    """Runs an application until SIGTERM or SIGINT, then drains it and exits with code 0.

    A second signal ends the drain. For `drain_s` seconds it is not ready but still accepts requests; then pending ones
    have `stop_s` seconds to finish. With `workers`, these accept the connections, and it serves what they relay.
    """

    def __init__(
        self,
        app: FastAPI,
        drain_s: float,
        stop_s: int,
        workers: Supervisor | None = None,
        on_start: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(app, stop_s, trusted=None if workers is None else "*")  # workers say what their clients said
        self._app, self._drain_s, self._workers, self._on_start = app, drain_s, workers, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts serving; with workers, once they all do. Until then a signal ends the process, then it drains it."""
        if self._workers is None:
            await super().startup(sockets)
        else:
            await super().startup([])
            await self._workers.start(self._app.state.service, self.serve_connection)
        if threading.current_thread() is threading.main_thread():  # no other thread can handle signals
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._drain, loop)
        if self.started:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses new connections and completes pending requests."""
        if self._workers is not None:
            for listening in sockets or []:
                listening.close()
            await self._workers.stop()
        await super().shutdown(sockets)

    def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._app.state.draining:
            self.should_exit = True
            return
        log.info("Draining: not ready, still serving requests for %g s", self._drain_s)
        self._app.state.draining = True
        loop.call_later(self._drain_s, setattr, self, "should_exit", True)


def keep_memory() -> None:
    """Makes glibc, where it is the C library, keep freed memory for the next forward pass.

    Otherwise it returns activations to the kernel after every layer, which zeroes the pages again: a tenth of the time
    of a forward pass on a CPU.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_M_MMAP_THRESHOLD, 2**25)


def bind(host: str, port: int) -> socket.socket:
    """Opens a listening socket; port 0 takes a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        hint = " Choose another with --port." if error.errno == errno.EADDRINUSE else ""
        raise AddendaError(f"Cannot listen on {host}:{port}: {error.strerror}.{hint}") from error
    # Accepted connections inherit it. Otherwise a response's body waits 40 ms until its headers are acknowledged.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def serve_metrics(app: FastAPI, host: str, port: int) -> int:
    """Serves metrics without keys on a separate port (0: a free one) and returns the port."""
    try:
        server, _ = start_http_server(port, host, app.state.metrics.registry)
    except OSError as error:
        raise AddendaError(
            f"--metrics-port cannot listen on {host}:{port}: {error.strerror}. Choose another port or --host."
        ) from error
    return server.server_port


def log_as_json(level: str) -> None:
    """Writes all log records and warnings to standard error as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level="WARNING", force=True)
    logging.captureWarnings(True)
    threading.excepthook = lambda failed: log.error(
        "A thread failed", exc_info=(failed.exc_type, failed.exc_value or failed.exc_type(), failed.exc_traceback)
    )
    sys.unraisablehook = lambda failed: log.error("Unraisable exception: %r", failed.exc_value or failed.object)
    # `routes` has logged it with the request's id.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "Exception in ASGI application" not in str(record.msg))
    for name in ("addenda", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
