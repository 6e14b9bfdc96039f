"""The HTTP application with all routes."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware

from addenda import __version__
from addenda.serving import api, api_tasks, inference, page, problems, telemetry
from addenda.serving.keys import KeyFile
from addenda.serving.service import Limits, Service
from addenda.serving.telemetry import ServerMetrics, Telemetry


def make_app(start: Callable[[], Service], keys: KeyFile, loopback: bool = True) -> FastAPI:
    """Builds the app; `start` creates its service on the event loop; `loopback`: it serves this machine only."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = start()
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
        exception_handlers=problems.HANDLERS,
        middleware=[Middleware(Telemetry, metrics=metrics)],
        max_body_size=Limits().bundle_bytes,
    )
    app.state.keys, app.state.loopback, app.state.metrics, app.state.draining = keys, loopback, metrics, False
    app.state.body_bytes, app.state.uploads = 0, asyncio.Semaphore(api_tasks.UPLOADS)
    app.state.verifying, app.state.verifications = threading.Lock(), deque(maxlen=100)
    app.state.registering, app.state.replies = asyncio.Lock(), {}
    for routes in (telemetry, inference, api, api_tasks, page):
        app.include_router(routes.router)
    app.include_router(page.plain)
    return app
