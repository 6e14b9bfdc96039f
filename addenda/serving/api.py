"""REST API for predictions and for the server: predict, status, verify, events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from addenda import __version__
from addenda.exceptions import DataError
from addenda.serving.answers import INLINE, embedding
from addenda.serving.outputs import Wanted
from addenda.serving.routes import (
    BINARY,
    ProblemError,
    Served,
    body_schema,
    needs,
    problem_responses,
    read_images,
    while_connected,
)
from addenda.serving.service import ServedPrediction

AUTO = "auto"
POLL_S = 0.2
"""Seconds between checks for a new generation, for event listeners."""

router = APIRouter(prefix="/api/v1", responses=problem_responses(401, 403))
_FORM = {"type": "object", "required": ["image"], "properties": {"image": BINARY}}
_SERVER: dict[str, Any] = {"tags": ["server"], "dependencies": [needs("predict")]}
_VERIFY: dict[str, Any] = {"dependencies": [needs("admin")], "responses": problem_responses(404, 409, 422, 503)}


class Label(BaseModel):
    """A label and its probability."""

    label: str
    probability: float


class TaskPrediction(BaseModel):
    """A task's prediction for an image; `sha256` is the digest of the task's artifact."""

    ref: str
    sha256: str
    objective: str
    labels: list[Label]


class RoutedTask(BaseModel):
    """The task that the router chose; `familiar` is false if the image is unlike that task's training images."""

    task: str
    probability: float
    familiar: bool


class Prediction(BaseModel):
    """Predictions for one image, all from one generation."""

    generation: int
    exact: bool
    chosen: RoutedTask | None = None
    tasks: dict[str, TaskPrediction]


TimeoutMs = Annotated[int | None, Header(ge=1, le=3_600_000)]


class Feature(BaseModel):
    """A feature of an image; of a task's feature also the task's reference and the digest of its artifact."""

    values: list[float]
    ref: str | None = None
    sha256: str | None = None


class Embedding(BaseModel):
    """Features of one image, all from one generation."""

    generation: int
    exact: bool
    backbone_fingerprint: str
    numerics_fingerprint: str
    features: dict[str, Feature]


class Status(BaseModel):
    """The current state of the server."""

    version: str
    generation: int
    registry_reachable: bool
    alias: str | None
    backbone: str
    backbone_fingerprint: str
    numerics_fingerprint: str
    tasks: dict[str, str]
    quarantined: dict[str, str]
    waiting_images: int
    draining: bool


class Verification(BaseModel):
    """The result of recomputing the golden probes of the served tasks."""

    at: str
    generation: int
    ok: bool
    tasks: list[dict[str, Any]]


@router.post(
    "/predict",
    tags=["predict"],
    dependencies=[needs("predict")],
    summary="Predicts for an image",
    responses=problem_responses(400, 404, 408, 409, 413, 415, 422, 503, 504),
    response_model=Prediction,
    openapi_extra=body_schema({"image/*": BINARY, "multipart/form-data": _FORM}),
)
async def predict(
    request: Request,
    service: Served,
    tasks: Annotated[
        list[str] | None,
        Query(
            description="Task names, or patterns with '*', either with ':version' or '@alias'; repeated or "
            "comma-separated. Default: all."
        ),
    ] = None,
    tag: Annotated[str | None, Query(max_length=100, description="Only tasks with this tag.")] = None,
    task: Annotated[str | None, Query(description="A task name, or 'auto' to let the router choose the task.")] = None,
    top: Annotated[int | None, Query(ge=1, le=1000, description="Maximum number of labels per task.")] = None,
    min_probability: Annotated[
        float | None, Query(ge=0, le=1, description="Minimum probability of a label; then 'top' defaults to all.")
    ] = None,
    addenda_timeout_ms: TimeoutMs = None,
) -> Response:
    """Predicts for a JPEG, PNG or WebP file, sent as the body or as the form field `image`."""
    image = await _image(request, await read_images(request, service))
    timeout_s = addenda_timeout_ms and addenda_timeout_ms / 1000
    if task == AUTO and (tasks or tag):
        raise DataError("'task=auto' chooses among all tasks and cannot be combined with 'tasks' or 'tag'.")
    names = _listed(tasks) + ([] if task is None else [task])
    if task == AUTO:
        work = service.route([image], timeout_s)
    else:
        work = service.predict([image], names or None, timeout_s, tag=tag)
    served = await while_connected(request, work)
    if served.logits.matrix.numel() <= INLINE:
        content = _answer(served, top, min_probability)
    else:
        content = await asyncio.to_thread(_answer, served, top, min_probability)
    return Response(content, headers=served.logits.headers, media_type="application/json")


@router.post(
    "/embed",
    tags=["predict"],
    dependencies=[needs("predict")],
    summary="Computes features of an image",
    responses=problem_responses(400, 404, 408, 413, 415, 422, 503, 504),
    response_model=Embedding,
    openapi_extra=body_schema({"image/*": BINARY, "multipart/form-data": _FORM}),
)
async def embed(
    request: Request,
    service: Served,
    features: Annotated[
        list[str] | None,
        Query(
            description="'pooled', 'layers' and 'task:NAME', the feature that a task's head reads; repeated or "
            "comma-separated. Default: 'pooled'."
        ),
    ] = None,
    addenda_timeout_ms: TimeoutMs = None,
) -> Response:
    """Computes features of a JPEG, PNG or WebP file, sent as the body or as the form field `image`.

    Features are comparable between responses with the same fingerprints, and a task's with the same `sha256`.
    """
    image = await _image(request, await read_images(request, service))
    timeout_s = addenda_timeout_ms and addenda_timeout_ms / 1000
    work = service.embed([image], _listed(features) or ["pooled"], timeout_s)
    embedded = await while_connected(request, work)
    snapshot = embedded.snapshot
    content = embedding(snapshot.generation, snapshot.model, snapshot.numerics_fingerprint, embedded.logits)
    return Response(content, headers=embedded.logits.headers, media_type="application/json")


def _listed(values: list[str] | None) -> list[str]:
    """The items of a parameter that is repeated or comma-separated."""
    return [item.strip() for value in values or () for item in value.split(",")]


async def _image(request: Request, body: bytes) -> bytes:
    """The image file of a request: its body, or the file in its form."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/"):
        return body

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=8, max_part_size=4096).parse()
    except (MultiPartException, LookupError, ValueError) as error:
        reason = getattr(error, "message", "") or "it is malformed"
        raise DataError(f"The form cannot be parsed: {reason.rstrip('.')}.") from error
    try:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise DataError("The form has no file in the field 'image'.")
        return await image.read()
    finally:
        await form.close()


def _answer(served: ServedPrediction, top: int | None, min_probability: float | None) -> bytes:
    """The response for the request's image; with a router, of the chosen task."""
    choice, logits = served.choices[0] if served.choices else None, served.logits
    if choice is not None:
        logits = logits.select(Wanted((choice.task,)))
    plan = served.snapshot.plan(*logits)
    return plan.answer(served.snapshot.generation, logits.exact, logits.matrix, top, min_probability, choice)


@router.get("/status", **_SERVER, summary="The server's state")
def status(request: Request, service: Served) -> Status:
    """Returns the served generation, its tasks, and the fingerprints that results depend on."""
    snapshot = service.snapshot
    return Status(
        version=__version__,
        generation=snapshot.generation,
        registry_reachable=service.follower.reachable,
        alias=service.alias,
        backbone=service.backbone.name,
        backbone_fingerprint=service.backbone.fingerprint,
        numerics_fingerprint=snapshot.numerics_fingerprint,
        tasks=snapshot.refs,
        quarantined=snapshot.quarantined,
        waiting_images=service.batcher.num_waiting,
        draining=request.app.state.draining,
    )


@router.post("/verify", tags=["server"], **_VERIFY, summary="Recomputes golden probes")
def verify(request: Request, service: Served) -> Verification:
    """Recomputes the golden probes of the served tasks on the served model; one verification runs at a time."""
    if not request.app.state.verifying.acquire(blocking=False):  # waiting ones would take all threads
        raise ProblemError(409, "A verification is running already. Its result will be in GET /api/v1/verifications.")
    try:
        snapshot, verdicts = service.verify()
    finally:
        request.app.state.verifying.release()
    verification = Verification(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        generation=snapshot.generation,
        ok=all(verdict.ok for verdict in verdicts) and not snapshot.quarantined,
        tasks=[vars(verdict) for verdict in verdicts]
        + [{"task": ref, "ok": False, "detail": f"quarantined: {why}"} for ref, why in snapshot.quarantined.items()],
    )
    request.app.state.verifications.appendleft(verification)
    return verification


@router.get("/verifications", **_SERVER, summary="Recent verifications")
def verifications(request: Request) -> list[Verification]:
    """Lists the last 100 verifications since the server started, newest first."""
    return list(request.app.state.verifications)


@router.get("/events", **_SERVER, summary="Streams generation changes", response_class=EventSourceResponse)
async def events(request: Request, service: Served) -> AsyncIterator[ServerSentEvent]:
    """Sends a server-sent event `generation` at once and after every change, until the server drains."""
    sent = None
    while not request.app.state.draining:
        snapshot = service.snapshot
        if snapshot is not sent:
            sent = snapshot
            data = {"generation": snapshot.generation, "tasks": snapshot.refs, "quarantined": snapshot.quarantined}
            yield ServerSentEvent(event="generation", id=str(snapshot.generation), data=data)
        if request.state.is_head:
            return
        await asyncio.sleep(POLL_S)
