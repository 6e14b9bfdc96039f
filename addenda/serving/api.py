"""The friendly API about images and about the server: predict, status, verify, events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from addenda import __version__
from addenda.combined import numerics, numerics_fingerprint, predictions_of
from addenda.exceptions import DataError
from addenda.serving.access import Served, needs
from addenda.serving.bodies import BINARY, read_images, takes, while_connected
from addenda.serving.problems import documents
from addenda.serving.service import ServedPrediction

AUTO = "auto"
LOOK_S = 0.2
"""Between looks for another generation, for those who listen."""

router = APIRouter(prefix="/api/v1", responses=documents(401, 403))
_FORM = {"type": "object", "required": ["image"], "properties": {"image": BINARY}}
_SERVER: dict[str, Any] = {"tags": ["server"], "dependencies": [needs("predict")]}
_VERIFY: dict[str, Any] = _SERVER | {"dependencies": [needs("admin")], "responses": documents(404, 409, 422, 503)}


class Label(BaseModel):
    """A class, and how probable it is."""

    label: str
    probability: float


class TaskPrediction(BaseModel):
    """A task's answer about an image, and which task it is to the byte."""

    ref: str
    sha256: str
    objective: str
    labels: list[Label]


class Chosen(BaseModel):
    """The task that a router chose; not familiar: the image looks like none of their images."""

    task: str
    probability: float
    familiar: bool


class Prediction(BaseModel):
    """Answers about one image, all of one generation."""

    generation: int
    exact: bool
    chosen: Chosen | None = None
    tasks: dict[str, TaskPrediction]


class Status(BaseModel):
    """What a server is at this moment."""

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


class Verified(BaseModel):
    """What became of the golden probes of the served tasks."""

    at: str
    generation: int
    ok: bool
    tasks: list[dict[str, Any]]


@router.post(
    "/predict",
    tags=["predict"],
    dependencies=[needs("predict")],
    summary="Answers an image",
    responses=documents(400, 404, 408, 409, 413, 415, 422, 503, 504),
    response_model_exclude_none=True,
    openapi_extra=takes({"image/*": BINARY, "multipart/form-data": _FORM}),
)
async def predict(
    request: Request,
    service: Served,
    tasks: Annotated[list[str] | None, Query(description="Names of tasks, also with commas; default: all.")] = None,
    task: Annotated[
        str | None, Query(description="A task's name, or 'auto': the one that the image looks like.")
    ] = None,
    top: Annotated[int | None, Query(ge=1, le=1000, description="Labels of each task, at most.")] = None,
    addenda_timeout_ms: Annotated[int | None, Header(ge=1, le=3_600_000)] = None,
) -> Prediction:
    """Answers a JPEG, PNG or WebP file, sent as it is or as the field `image` of a form."""
    image = await _image(request, await read_images(request, service))
    timeout_s = None if addenda_timeout_ms is None else addenda_timeout_ms / 1000
    if task == AUTO:
        if tasks:
            raise DataError("'task=auto' chooses among all tasks: leave 'tasks' out.")
        return _prediction(await while_connected(request, service.route([image], timeout_s)), top)
    names = [name.strip() for part in tasks or () for name in part.split(",")] + ([] if task is None else [task])
    return _prediction(await while_connected(request, service.answer([image], names or None, timeout_s)), top)


async def _image(request: Request, body: bytes) -> bytes:
    """The image of a body: the body itself, or the one file of its form."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/"):
        return body

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(request.headers, once(), max_files=1, max_fields=8, max_part_size=4096).parse()
    except (MultiPartException, LookupError, ValueError) as error:
        said = getattr(error, "message", "") or "it is damaged"
        raise DataError(f"The form cannot be read: {said}.") from error
    try:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise DataError("The form has no file in its field 'image'.")
        return await image.read()
    finally:
        await form.close()


def _prediction(answered: ServedPrediction, top: int | None) -> Prediction:
    choice = answered.choices[0] if answered.choices else None
    names = [choice.task] if choice else list(answered.logits)
    asked = {name: answered.snapshot.model.tasks[name] for name in names}
    best = predictions_of(asked.values(), answered.logits, top)
    tasks = {}
    for name, found in asked.items():
        labels = [Label(label=label, probability=probability) for label, probability in best[name][0]]
        tasks[name] = TaskPrediction(ref=found.ref, sha256=found.sha256, objective=found.objective, labels=labels)
    return Prediction(
        generation=answered.snapshot.generation,
        exact=answered.logits.exact,
        chosen=None if choice is None else Chosen(**choice._asdict()),
        tasks=tasks,
    )


@router.get("/status", **_SERVER, summary="What the server is now")
def status(request: Request, service: Served) -> Status:
    """The generation that is served, its tasks, and what bits depend on."""
    snapshot = service.snapshot
    return Status(
        version=__version__,
        generation=snapshot.generation,
        registry_reachable=service.follower.reachable,
        alias=service.alias,
        backbone=service.backbone.name,
        backbone_fingerprint=service.backbone.fingerprint,
        numerics_fingerprint=numerics_fingerprint(numerics(service.backbone)),
        tasks=snapshot.refs,
        quarantined=dict(snapshot.quarantined),
        waiting_images=service.batcher.num_waiting,
        draining=request.app.state.draining,
    )


@router.post("/verify", **_VERIFY, summary="Recomputes golden probes")
def verify(request: Request, service: Served) -> Verified:
    """Recomputes the golden probes of the served tasks, on the model as it serves, one verification at a time."""
    with request.app.state.verifying:
        snapshot, verdicts = service.verify()
    found = Verified(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        generation=snapshot.generation,
        ok=all(verdict.ok for verdict in verdicts) and not snapshot.quarantined,
        tasks=[vars(verdict) for verdict in verdicts]
        + [{"task": ref, "ok": False, "detail": f"quarantined: {why}"} for ref, why in snapshot.quarantined.items()],
    )
    request.app.state.verifications.appendleft(found)
    return found


@router.get("/verifications", **_SERVER, summary="Verifications so far")
def verifications(request: Request) -> list[Verified]:
    """The last hundred since the server started, newest first."""
    return list(request.app.state.verifications)


@router.get("/events", **_SERVER, summary="Says when another generation is served", response_class=EventSourceResponse)
async def events(request: Request, service: Served) -> AsyncIterator[ServerSentEvent]:
    """A server-sent event `generation` at once, and whenever another one is served; it ends when the server stops."""
    told = None
    while not request.app.state.draining:
        snapshot = service.snapshot
        if snapshot is not told:
            told = snapshot
            quarantined = dict(snapshot.quarantined)
            data = {"generation": snapshot.generation, "tasks": snapshot.refs, "quarantined": quarantined}
            yield ServerSentEvent(event="generation", id=str(snapshot.generation), data=data)
        if request.state.is_head:
            return
        await asyncio.sleep(LOOK_S)
