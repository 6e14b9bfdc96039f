"""REST API for tasks: which are registered and served, registering bundles, moving aliases.

The response to a change waits until the change is served.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from addenda.exceptions import RegistryError, UnknownTaskError
from addenda.registry import Registry, TaskFilter, TaskRecord, plain_name
from addenda.registry.exchange.manifest import Version
from addenda.serving.routes import (
    BINARY,
    ProblemError,
    Served,
    body_schema,
    needs,
    problem_responses,
    read_body,
    save_body,
)
from addenda.serving.service import Service

SETTLE_S = 30.0
"""Maximum seconds to wait until a change is served."""
UPLOADS = 4
"""Maximum number of bundles on disk at a time."""
MAX_TARGET_BYTES = 4096
"""Maximum size of a request that moves an alias."""
MAX_REPLIES = 1000
"""Maximum number of stored responses for repeated idempotency keys."""
_KEY = re.compile(r"[\x21-\x7e]{1,200}")

router = APIRouter(prefix="/api/v1/tasks", tags=["tasks"], responses=problem_responses(401, 403, 404, 422, 503))
_PREDICT: dict[str, Any] = {"dependencies": [needs("predict")]}
_MOVE: dict[str, Any] = {"dependencies": [needs("admin")], "responses": problem_responses(409, 412, 428)}


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


class ImportedTask(BaseModel):
    """The outcome for one task of a bundle, and its state."""

    ref: str
    origin: str
    outcome: str
    detail: str
    state: str
    reason: str | None = None


class ImportResult(BaseModel):
    """The outcome for a bundle; with `dry_run`, what the outcome would be."""

    generation: int
    dry_run: bool
    tasks: list[ImportedTask]


class Alias(BaseModel):
    """An alias and the version it points at."""

    name: str
    alias: str
    version: int


class AliasTarget(BaseModel):
    """The version that an alias is to point at."""

    version: Version


async def _registry(request: Request, service: Served) -> Registry:
    """The registry, recording changes under the name of the request's key."""
    user = request.state.user
    return service.registry if user is None else service.registry.on_behalf_of(user)


WritableRegistry = Annotated[Registry, Depends(_registry)]


@router.get("", **_PREDICT, summary="Lists tasks", responses=problem_responses(400))
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


@router.get("/{name}", **_PREDICT, summary="A task")
def show(service: Served, name: str) -> TaskState:
    """Returns the served version, or else the newest active one."""
    return _state(service, service.registry.record(_served_or_newest(service, name)))


@router.get("/{name}/versions", **_PREDICT, summary="All versions of a task")
def versions(service: Served, name: str) -> list[TaskState]:
    """Lists the newest 1,000 versions, including retired ones, oldest first."""
    records = service.registry.tasks(TaskFilter(name=plain_name(name), retired=True), 1000)
    if not records:
        raise UnknownTaskError(f"Task {name!r} is not registered.")
    return [_state(service, record) for record in records]


@router.get("/{name}/lineage", **_PREDICT, summary="The lineage of a task")
def lineage(service: Served, name: str) -> dict[str, Any]:
    """Returns what the served version (or else the newest active one) extends, and what extends it."""
    return asdict(service.registry.lineage(_served_or_newest(service, name)))


@router.get("/{name}/versions/{version}", **_PREDICT, summary="A version of a task")
def show_version(service: Served, name: str, version: int) -> TaskState:
    """Returns its registry record, and whether it is served."""
    return _state(service, service.registry.record(_ref_of(name, version)))


@router.get("/{name}/versions/{version}/lineage", **_PREDICT, summary="The lineage of a version")
def version_lineage(service: Served, name: str, version: int) -> dict[str, Any]:
    """Returns what it extends, and what extends it."""
    return asdict(service.registry.lineage(_ref_of(name, version)))


@router.get(
    "/{name}/versions/{version}/artifact",
    **_PREDICT,
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
    if if_none_match is not None and (if_none_match.strip() == "*" or record.sha256 in _tags(if_none_match)):
        return Response(status_code=304, headers=headers)
    headers["Content-Disposition"] = f'attachment; filename="{name}-{version}.safetensors"'
    return Response(service.registry.get(ref).artifact, headers=headers, media_type="application/octet-stream")


@router.post(
    "",
    dependencies=[needs("register")],
    status_code=201,
    summary="Registers a bundle",
    responses={
        200: {"model": ImportResult, "description": "Nothing was added: all tasks exist already, or it was a dry run."},
        202: {"model": ImportResult, "description": "Registered, but not served yet."},
        **problem_responses(400, 408, 409, 413, 415),
    },
    openapi_extra=body_schema({"application/octet-stream": BINARY}),
)
async def register(
    request: Request,
    response: Response,
    service: Served,
    registry: WritableRegistry,
    dry_run: Annotated[bool, Query(description="Report the outcome without registering anything.")] = False,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> ImportResult:
    """Registers a bundle written by `addenda tasks export`, all of it or nothing, and responds once it is served.

    A `register` key may add new names, and new versions of names that it created itself.

    A repeated Idempotency-Key returns the stored response while the server runs. Without one, a bundle that is sent
    again is reported as already registered.
    """
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        raise ProblemError(400, "Idempotency-Key must be 1 to 200 visible ASCII characters.")
    uploads: asyncio.Semaphore = request.app.state.uploads
    if uploads.locked():
        raise ProblemError(503, f"{UPLOADS} bundles are being uploaded. Try again later.", {"Retry-After": "10"})
    replies: dict[tuple[str | None, str | None], tuple[str, int, ImportResult]] = request.app.state.replies
    reply_key = (request.state.user, idempotency_key)
    owner = request.state.user if request.state.scope == "register" else None
    async with uploads:  # while the bundle is on disk
        with tempfile.TemporaryDirectory(prefix="addenda-") as folder:
            path = Path(folder) / "upload.addenda"
            digest = f"{await save_body(request, service.limits.bundle_bytes, path)} {dry_run}"
            async with request.app.state.registering:
                if reply_key in replies:
                    previous_digest, status, reply = replies[reply_key]
                    if previous_digest != digest:
                        detail = f"Idempotency-Key {idempotency_key!r} was used with another request; send a new one."
                        raise ProblemError(422, detail)
                else:
                    status, reply = await asyncio.to_thread(_register, service, registry, path, dry_run, owner)
                    if idempotency_key is not None and status != 202:
                        replies[reply_key] = digest, status, reply
                        if len(replies) > MAX_REPLIES:
                            del replies[next(iter(replies))]
                response.status_code = status
                return reply


@router.get("/{name}/aliases/{alias}", **_PREDICT, summary="An alias")
def alias(response: Response, service: Served, name: str, alias: str) -> Alias:
    """Returns the version that the alias points at, also as the ETag that changes require."""
    record = service.registry.record(f"{plain_name(name)}@{alias}")
    response.headers["ETag"] = f'"{record.version}"'
    return Alias(name=name, alias=alias, version=record.version)


@router.put(
    "/{name}/aliases/{alias}",
    dependencies=[needs("admin")],
    responses=problem_responses(408, 409, 412, 413, 415, 428),
    summary="Points an alias at a version",
    openapi_extra=body_schema({"application/json": AliasTarget.model_json_schema()}),
)
async def set_alias(
    request: Request,
    response: Response,
    service: Served,
    registry: WritableRegistry,
    name: str,
    alias: str,
    if_match: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Alias:
    """Moves the alias, if its state matches the precondition, and responds once the change is served.

    The precondition is `If-Match: "VERSION"` (it points at that version) or `If-None-Match: *` (it does not exist).
    """
    try:  # FastAPI would read a body of any size before it checks the key
        version = AliasTarget.model_validate_json(await read_body(request, MAX_TARGET_BYTES)).version
    except ValidationError as error:
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]) from error

    def move() -> None:
        registry.set_alias(plain_name(name), alias, version, expected=_expected(if_match, if_none_match))
        _wait_until_served(service, f"'{name}@{alias}'")

    await asyncio.to_thread(move)
    response.headers["ETag"] = f'"{version}"'
    return Alias(name=name, alias=alias, version=version)


@router.delete("/{name}/aliases/{alias}", **_MOVE, status_code=204, summary="Removes an alias")
def remove_alias(
    service: Served, registry: WritableRegistry, name: str, alias: str, if_match: Annotated[str | None, Header()] = None
) -> None:
    """Removes the alias if it points at the version in `If-Match`, and responds once the change is served."""
    registry.remove_alias(plain_name(name), alias, expected=_expected(if_match, None))
    _wait_until_served(service, f"'{name}@{alias}'")


def _tags(header: str) -> list[str]:
    """The entity tags of a header."""
    return [tag.strip().removeprefix("W/").strip('"') for tag in header.split(",") if tag.strip()]


def _ref_of(name: str, version: int) -> str:
    return f"{plain_name(name)}:{version}"


def _served_or_newest(service: Service, name: str) -> str:
    served = service.snapshot.records.get(name)
    return served.ref if served else plain_name(name)


def _state(service: Service, record: TaskRecord) -> TaskState:
    state, reason = service.snapshot.state(record.ref)
    return TaskState(ref=record.ref, state=state, reason=reason, record=asdict(record))


def _register(
    service: Service, registry: Registry, path: Path, dry_run: bool, owner: str | None
) -> tuple[int, ImportResult]:
    """Registers a bundle and waits until it is served; returns the HTTP status and the outcome."""
    try:
        received = registry.import_bundle(path, dry_run=dry_run, owner=owner)
    except RegistryError as error:  # without the path of the temporary file
        raise type(error)(str(error).replace(f" {str(path)!r}", "")) from error
    settled = dry_run or service.follower.settle(service.registry.generation, SETTLE_S)
    added = not dry_run and any(task.state == "added" for task in received)
    status = (201 if added else 200) if settled else 202
    snapshot, tasks = service.snapshot, []
    for task in received:
        state, reason = snapshot.state(task.ref)
        if state == "not served" and not dry_run:
            reason = "a newer version is served, or this one is retired or needs another backbone"
            if not settled:
                reason = f"it is being loaded; see GET /api/v1/tasks/{task.ref.partition(':')[0]}"
            elif service.alias:
                reason = f"only versions with the alias {service.alias!r} are served"
        tasks.append(
            ImportedTask(
                ref=task.ref, origin=task.origin, outcome=task.state, detail=task.detail, state=state, reason=reason
            )
        )
    return status, ImportResult(generation=snapshot.generation, dry_run=dry_run, tasks=tasks)


def _wait_until_served(service: Service, alias: str) -> None:
    """Waits until a change of an alias is served."""
    if not service.follower.settle(service.registry.generation, SETTLE_S):
        raise ProblemError(503, f"Alias {alias} was changed, but the change is not served yet.", {"Retry-After": "5"})


def _expected(if_match: str | None, if_none_match: str | None) -> int:
    """The version that the precondition names, 0 for none."""
    if if_none_match == "*" and if_match is None:
        return 0
    match _tags(if_match or ""):
        case [tag] if if_none_match is None and re.fullmatch("[0-9]{1,9}", tag):
            return int(tag)
    raise ProblemError(
        428, 'Send If-Match: "VERSION" (the ETag of GET), or If-None-Match: * if the alias does not exist.'
    )
