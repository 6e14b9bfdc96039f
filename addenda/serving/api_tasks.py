"""The friendly API about tasks: what is registered, and what of it is served."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel

from addenda.exceptions import UnknownTaskError
from addenda.registry import TaskFilter, TaskRecord
from addenda.serving.access import needs, service_of
from addenda.serving.problems import documents
from addenda.serving.snapshot import Snapshot

router = APIRouter(prefix="/api/v1/tasks", tags=["tasks"], responses=documents(401, 403, 404, 422, 503))
PREDICT: dict[str, Any] = {"dependencies": [needs("predict")]}


class TaskState(BaseModel):
    """A version, and whether it is served; `record` is what the registry knows of it.

    `state` is "serving", "quarantined" (then `reason` says why) or "not served".
    """

    ref: str
    state: str
    reason: str | None = None
    record: dict[str, Any]


class Page(BaseModel):
    """Some tasks, the newest last; `next` is what `before` must be for the page before them."""

    tasks: list[TaskState]
    next: str | None


@router.get("", **PREDICT, summary="Lists tasks", responses=documents(400))
def list_tasks(
    request: Request,
    name: Annotated[str | None, Query(max_length=100, description="A name, or a pattern with *.")] = None,
    backbone: Annotated[str | None, Query(max_length=100)] = None,
    tag: Annotated[str | None, Query(max_length=100)] = None,
    extends: Annotated[str | None, Query(max_length=100)] = None,
    min_score: Annotated[float | None, Query(ge=0, le=1)] = None,
    since: Annotated[str | None, Query(max_length=40)] = None,
    until: Annotated[str | None, Query(max_length=40)] = None,
    retired: bool = False,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[str | None, Query(max_length=100)] = None,
) -> Page:
    """Every version that the conditions let through, a page at a time, from the newest back."""
    service = service_of(request)
    chosen = TaskFilter(name, backbone, tag, extends, min_score, since, until, retired)
    found = service.registry.tasks(chosen, limit, before)
    states = [_state(service.snapshot, record) for record in found]
    return Page(tasks=states, next=found[0].ref if len(found) == limit else None)


@router.get("/{name}", **PREDICT, summary="A task as it is served")
def show(request: Request, name: str) -> TaskState:
    """The version that is served, else the newest one that is active."""
    service = service_of(request)
    served = service.snapshot.records.get(name)
    return _state(service.snapshot, service.registry.record(served.ref if served else plain_name(name)))


@router.get("/{name}/versions", **PREDICT, summary="All versions of a task")
def versions(request: Request, name: str) -> list[TaskState]:
    """Retired ones too, oldest first; a thousand at most, the newest."""
    service = service_of(request)
    found = service.registry.tasks(TaskFilter(name=plain_name(name), retired=True), 1000)
    if not found:
        raise UnknownTaskError(f"Task {name!r} is not registered.")
    return [_state(service.snapshot, record) for record in found]


@router.get("/{name}/lineage", **PREDICT, summary="What a task extends, and what extends it")
def lineage(request: Request, name: str) -> dict[str, Any]:
    """Of the version that is served, else of the newest one that is active."""
    service = service_of(request)
    served = service.snapshot.records.get(name)
    return asdict(service.registry.lineage(served.ref if served else plain_name(name)))


@router.get("/{name}/versions/{version}", **PREDICT, summary="A version of a task")
def show_version(request: Request, name: str, version: int) -> TaskState:
    """What the registry knows of it, and whether it is served."""
    service = service_of(request)
    return _state(service.snapshot, service.registry.record(ref_of(name, version)))


@router.get("/{name}/versions/{version}/lineage", **PREDICT, summary="The lineage of a version")
def version_lineage(request: Request, name: str, version: int) -> dict[str, Any]:
    """What it extends, and what extends it."""
    return asdict(service_of(request).registry.lineage(ref_of(name, version)))


@router.get(
    "/{name}/versions/{version}/artifact",
    **PREDICT,
    summary="The bytes of a version",
    response_class=Response,
    responses={
        200: {"description": "safetensors; their sha256 is the ETag.", "content": {"application/octet-stream": {}}},
        304: {"description": "They are those that If-None-Match names."},
    },
)
def artifact(
    request: Request, name: str, version: int, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """Its tensors and manifest, as they were registered."""
    ref = ref_of(name, version)
    record = service_of(request).registry.record(ref)
    headers = {"ETag": f'"{record.sha256}"', "Cache-Control": "private, immutable"}
    if if_none_match is not None and (if_none_match.strip() == "*" or record.sha256 in tags(if_none_match)):
        return Response(status_code=304, headers=headers)
    headers["Content-Disposition"] = f'attachment; filename="{name}-{version}.safetensors"'
    data = service_of(request).registry.get(ref).artifact
    return Response(data, headers=headers, media_type="application/octet-stream")


def tags(header: str) -> list[str]:
    """The entity tags of a header."""
    return [tag.strip().removeprefix("W/").strip('"') for tag in header.split(",") if tag.strip()]


def plain_name(name: str) -> str:
    """A name that is no other kind of reference."""
    if any(mark in name for mark in ":@*"):
        raise UnknownTaskError(f"Task {name!r} is not registered: names hold no ':', '@' or '*'.")
    return name


def ref_of(name: str, version: int) -> str:
    """The reference of a version of such a name."""
    return f"{plain_name(name)}:{version}"


def _state(snapshot: Snapshot, record: TaskRecord) -> TaskState:
    state, reason = snapshot.state(record.ref)
    return TaskState(ref=record.ref, state=state, reason=reason, record=asdict(record))
