"""Prometheus metrics, one JSON log line per request, and request ids."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from addenda.serving.routes import ProblemError, needs
from addenda.serving.service import Service

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
"""Methods with a label value of their own; any other counts as "other", so clients cannot create labels."""
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64)

log = logging.getLogger("addenda.serving.requests")


class ServerMetrics:
    """The metrics of one server, in their own prometheus_client registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        count, histogram = partial(Counter, registry=registry), partial(Histogram, buckets=SECONDS, registry=registry)
        latency = "Latency in seconds from a request's headers to the end of its response."
        self.requests = count("addenda_requests", "Number of requests.", ("method", "route", "status"))
        self.seconds = histogram("addenda_request_seconds", latency, ("route",))
        self.pass_images = histogram("addenda_pass_images", "Number of images in a forward pass.", buckets=IMAGES)
        self.pass_seconds = histogram("addenda_pass_seconds", "Forward-pass latency in seconds.")
        self.cached = count("addenda_cache_images", "Number of images looked up in the cache.", ("result",))

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Records a request."""
        self.requests.labels(method, route, status).inc()
        self.seconds.labels(route).observe(seconds)

    def report(self, images: int, seconds: float) -> None:
        """Records a forward pass."""
        self.pass_images.observe(images)
        self.pass_seconds.observe(seconds)

    def watch(self, service: Service) -> None:
        """Observes a service's forward passes, and adds gauges of its current state."""
        service.batcher.report = self.report
        if (cache := service.cache) is not None:
            cache.report = lambda hit: self.cached.labels("hit" if hit else "miss").inc()
            size = Gauge("addenda_cache_bytes", "Bytes of cached outputs.", registry=self.registry)
            size.set_function(lambda: cache.size_bytes)
        for name, description, value in (
            ("generation", "Registry generation being served.", lambda: service.snapshot.generation),
            ("tasks", "Number of served tasks.", lambda: len(service.snapshot.records)),
            ("quarantined_tasks", "Number of quarantined tasks.", lambda: len(service.snapshot.quarantined)),
            ("waiting_images", "Number of images queued or being computed.", lambda: service.batcher.num_waiting),
            ("registry_up", "1 while the registry is reachable, else 0.", lambda: service.follower.reachable),
        ):
            Gauge(f"addenda_{name}", description, registry=self.registry).set_function(value)


class Telemetry:
    """ASGI middleware that assigns request ids, counts requests and logs each one, without its headers and query."""

    def __init__(self, app: ASGIApp, count: Callable[[str, str, int, float], None]) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        method, is_head = scope["method"], scope["method"] == "HEAD"
        state |= {"id": request_id, "is_head": is_head}
        if is_head:  # handled as GET; the server omits the body
            scope = {**scope, "method": "GET"}
        started, status = time.monotonic(), 499

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            status = 500  # sent by the error handler outside this middleware
            raise
        finally:
            seconds = time.monotonic() - started
            scope["app"].state.bodies.give(state.get("body_bytes", 0))
            route = getattr(scope.get("route"), "path", "none")
            self.count(method if method in METHODS else "other", route, status, seconds)
            facts = {"method": method, "path": scope["path"], "status": status, "request_id": request_id}
            log.info("request", extra={"facts": {**facts, "key": state.get("key"), "ms": round(1000 * seconds, 1)}})


class JsonLines(logging.Formatter):
    """Formats log records as JSON lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats one record."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"at": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


router = APIRouter(tags=["health"])


@router.get("/livez", summary="Liveness probe")
async def livez() -> dict[str, bool]:
    """Always 200 while the process runs."""
    return {"live": True}


@router.get("/readyz", summary="Readiness probe")
async def readyz(request: Request) -> dict[str, bool]:
    """200 when ready; 503 while the server drains, which still serves requests."""
    check_ready(request)
    return {"ready": True}


def check_ready(request: Request) -> None:
    """Raises a ProblemError (503) while the server drains."""
    if request.app.state.draining:
        raise ProblemError(503, "The server is shutting down.", {"Retry-After": "5"})


@router.get(
    "/metrics",
    dependencies=[needs("predict")],
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"description": "The metrics in Prometheus text format.", "content": {"text/plain": {}}}},
)
async def metrics(request: Request) -> Response:
    """The metrics in Prometheus text format."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
