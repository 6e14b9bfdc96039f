"""Is the process alive, will it answer, and how is it: for orchestrators and Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from addenda.serving.access import needs
from addenda.serving.problems import ProblemError

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
