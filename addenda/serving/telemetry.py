"""What an operator sees: Prometheus metrics, one JSON line of log for each request, and request ids."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from addenda.serving.access import needs
from addenda.serving.problems import ProblemError
from addenda.serving.service import Service

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
"""What the metrics call by its name: a client may make up any number of others."""
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64)

log = logging.getLogger("addenda.serving.requests")


class ServerMetrics:
    """The metrics of one server, in a registry of prometheus_client's."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter("addenda_requests", "Requests answered.", ("method", "route", "status"), registry=own)
        told = "From a request's head to its answer's end."
        self.seconds = Histogram("addenda_request_seconds", told, ("route",), buckets=SECONDS, registry=own)
        self.pass_images = Histogram("addenda_pass_images", "Images of a pass.", buckets=IMAGES, registry=own)
        self.pass_seconds = Histogram("addenda_pass_seconds", "Of a pass.", buckets=SECONDS, registry=own)

    def report(self, images: int, seconds: float) -> None:
        """Notes a pass."""
        self.pass_images.observe(images)
        self.pass_seconds.observe(seconds)

    def watch(self, service: Service) -> None:
        """Adds what a service is at every moment."""
        now: dict[str, tuple[str, Callable[[], float]]] = {
            "generation": ("The registry's generation that is served.", lambda: service.snapshot.generation),
            "tasks": ("Tasks that are served.", lambda: len(service.snapshot.records)),
            "quarantined_tasks": ("Tasks that should be served and cannot.", lambda: len(service.snapshot.quarantined)),
            "waiting_images": ("Images that wait or are answered now.", lambda: service.batcher.num_waiting),
            "registry_up": ("1 while the registry answers.", lambda: service.follower.reachable),
        }
        for name, (said, value) in now.items():
            Gauge(f"addenda_{name}", said, registry=self.registry).set_function(value)


class Telemetry:
    """ASGI middleware: gives each request an id, counts it and writes a line about it; never a header or a query."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        method, is_head = scope["method"], scope["method"] == "HEAD"
        state |= {"id": request_id, "is_head": is_head}
        if is_head:  # answered as GET is; the server keeps the body to itself
            scope = {**scope, "method": "GET"}
        started, status = time.monotonic(), 499

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception:
            status = 500  # which is answered around this
            raise
        finally:
            seconds = time.monotonic() - started
            scope["app"].state.body_bytes -= state.get("body_bytes", 0)
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(method if method in METHODS else "other", route, status).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            facts = {"method": method, "path": scope["path"], "status": status, "request_id": request_id}
            log.info("request", extra={"facts": {**facts, "key": state.get("key"), "ms": round(1000 * seconds, 1)}})


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"at": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


router = APIRouter(tags=["health"])


@router.get("/livez", summary="Whether the process runs")
async def livez() -> dict[str, bool]:
    """Answers as long as the process does."""
    return {"live": True}


@router.get("/readyz", summary="Whether requests should be sent here")
async def readyz(request: Request) -> dict[str, bool]:
    """503 from the moment when the server is told to stop; it still answers what comes."""
    check_ready(request)
    return {"ready": True}


def check_ready(request: Request) -> None:
    """Raises a ProblemError (503) while the server is stopping."""
    if request.app.state.draining:
        raise ProblemError(503, "The server is stopping.", {"Retry-After": "5"})


@router.get(
    "/metrics",
    dependencies=[needs("predict")],
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"description": "In Prometheus's text format.", "content": {"text/plain": {}}}},
)
async def metrics(request: Request) -> Response:
    """In Prometheus's text format."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
