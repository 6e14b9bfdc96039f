"""REST API for tasks: which are registered, and which are served."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel

from addenda.exceptions import UnknownTaskError
from addenda.registry import TaskFilter, TaskRecord
from addenda.serving.access import Served, needs
from addenda.serving.problems import problem_responses
from addenda.serving.service import Service

router = APIRouter(prefix="/api/v1/tasks", tags=["tasks"], responses=problem_responses(401, 403, 404, 422, 503))
PREDICT: dict[str, Any] = {"dependencies": [needs("predict")]}


class TaskState(BaseModel):
    """A task version: its registry record, and its state, "serving", "quarantined" (with a reason) or "not served"."""

    ref: str
    state: str
    reason: str | None = None
    record: dict[str, Any]


class TaskPage(BaseModel):
    """A page of tasks, newest last; pass `next` as `before` to get the next older page."""

    tasks: list[TaskState]
    next: str | None


@router.get("", **PREDICT, summary="Lists tasks", responses=problem_responses(400))
def list_tasks(
    service: Served,
    name: Annotated[str | None, Query(max_length=100, description="A name or a pattern with *.")] = None,
    backbone: Annotated[str | None, Query(max_length=100)] = None,
    tag: Annotated[str | None, Query(max_length=100)] = None,
    extends: Annotated[str | None, Query(max_length=100)] = None,
    min_score: Annotated[float | None, Query(ge=0, le=1)] = None,
    since: Annotated[str | None, Query(max_length=40)] = None,
    until: Annotated[str | None, Query(max_length=40)] = None,
    retired: bool = False,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[str | None, Query(max_length=100)] = None,
) -> TaskPage:
    """Lists the versions that match all filters, in pages, starting with the newest page."""
    task_filter = TaskFilter(name, backbone, tag, extends, min_score, since, until, retired)
    records = service.registry.tasks(task_filter, limit, before)
    next_page = records[0].ref if len(records) == limit else None
    return TaskPage(tasks=[_state(service, record) for record in records], next=next_page)


@router.get("/{name}", **PREDICT, summary="A task")
def show(service: Served, name: str) -> TaskState:
    """Returns the served version, or else the newest active one."""
    return _state(service, service.registry.record(_served_or_newest(service, name)))


@router.get("/{name}/versions", **PREDICT, summary="All versions of a task")
def versions(service: Served, name: str) -> list[TaskState]:
    """Lists the newest 1,000 versions, including retired ones, oldest first."""
    records = service.registry.tasks(TaskFilter(name=plain_name(name), retired=True), 1000)
    if not records:
        raise UnknownTaskError(f"Task {name!r} is not registered.")
    return [_state(service, record) for record in records]


@router.get("/{name}/lineage", **PREDICT, summary="The lineage of a task")
def lineage(service: Served, name: str) -> dict[str, Any]:
    """Returns what the served version (or else the newest active one) extends, and what extends it."""
    return asdict(service.registry.lineage(_served_or_newest(service, name)))


@router.get("/{name}/versions/{version}", **PREDICT, summary="A version of a task")
def show_version(service: Served, name: str, version: int) -> TaskState:
    """Returns its registry record, and whether it is served."""
    return _state(service, service.registry.record(_ref_of(name, version)))


@router.get("/{name}/versions/{version}/lineage", **PREDICT, summary="The lineage of a version")
def version_lineage(service: Served, name: str, version: int) -> dict[str, Any]:
    """Returns what it extends, and what extends it."""
    return asdict(service.registry.lineage(_ref_of(name, version)))


@router.get(
    "/{name}/versions/{version}/artifact",
    **PREDICT,
    summary="The artifact of a version",
    response_class=Response,
    responses={
        200: {"description": "A safetensors file; ETag: its SHA-256.", "content": {"application/octet-stream": {}}},
        304: {"description": "The artifact matches If-None-Match."},
    },
)
def artifact(
    service: Served, name: str, version: int, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """Returns the tensors and manifest as registered."""
    ref = _ref_of(name, version)
    record = service.registry.record(ref)
    headers = {"ETag": f'"{record.sha256}"', "Cache-Control": "private, immutable"}
    if if_none_match is not None and (if_none_match.strip() == "*" or record.sha256 in tags(if_none_match)):
        return Response(status_code=304, headers=headers)
    headers["Content-Disposition"] = f'attachment; filename="{name}-{version}.safetensors"'
    return Response(service.registry.get(ref).artifact, headers=headers, media_type="application/octet-stream")


def tags(header: str) -> list[str]:
    """The entity tags of a header."""
    return [tag.strip().removeprefix("W/").strip('"') for tag in header.split(",") if tag.strip()]


def plain_name(name: str) -> str:
    """Checks that a name is not another kind of reference (version, alias or pattern)."""
    if any(mark in name for mark in ":@*"):
        raise UnknownTaskError(f"Task {name!r} is not registered: a name has no ':', '@' or '*'.")
    return name


def _ref_of(name: str, version: int) -> str:
    return f"{plain_name(name)}:{version}"


def _served_or_newest(service: Service, name: str) -> str:
    served = service.snapshot.records.get(name)
    return served.ref if served else plain_name(name)


def _state(service: Service, record: TaskRecord) -> TaskState:
    state, reason = service.snapshot.state(record.ref)
    return TaskState(ref=record.ref, state=state, reason=reason, record=asdict(record))
