"""REST API for changes: registering bundles and moving aliases; a response waits until the change is served."""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import BaseModel

from addenda.exceptions import RegistryError
from addenda.registry import Registry
from addenda.serving.access import Served, needs
from addenda.serving.api_tasks import PREDICT, plain_name, tags
from addenda.serving.bodies import BINARY, body_schema, save_body
from addenda.serving.problems import ProblemError, problem_responses
from addenda.serving.service import Service

SETTLE_S = 30.0
"""Maximum seconds to wait until a change is served."""
UPLOADS = 4
"""Maximum number of bundles on disk at a time."""
MAX_REPLIES = 1000
"""Maximum number of stored responses for repeated idempotency keys."""
_KEY = re.compile(r"[\x21-\x7e]{1,200}")

router = APIRouter(prefix="/api/v1/tasks", tags=["tasks"], responses=problem_responses(401, 403, 404, 422, 503))
_MOVE: dict[str, Any] = {"dependencies": [needs("admin")], "responses": problem_responses(409, 412, 428)}


def _user(request: Request) -> str | None:
    """The user that the registry's events record for a request's key; None if no key was required."""
    key: str | None = getattr(request.state, "key", None)
    return None if key is None else f"key {key}"


async def _registry(request: Request, service: Served) -> Registry:
    """The registry, recording changes under the name of the request's key."""
    user = _user(request)
    return service.registry if user is None else service.registry.on_behalf_of(user)


WritableRegistry = Annotated[Registry, Depends(_registry)]


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

    version: Annotated[int, Query(ge=1, le=999_999_999)]


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
    replies: dict[tuple[str | None, str], tuple[str, int, ImportResult]] = request.app.state.replies
    reply_key = (_user(request), idempotency_key or "")
    owner = _user(request) if getattr(request.state, "scope", "admin") == "register" else None
    async with uploads:  # while the bundle is on disk
        with tempfile.TemporaryDirectory(prefix="addenda-") as folder:
            path = Path(folder) / "upload.addenda"
            digest = f"{await save_body(request, service.limits.bundle_bytes, path)} {dry_run}"
            async with request.app.state.registering:
                if idempotency_key is not None and reply_key in replies:
                    previous_digest, response.status_code, reply = replies[reply_key]
                    if previous_digest != digest:
                        raise ProblemError(
                            422, f"Idempotency-Key {idempotency_key!r} was used with another request; send a new one."
                        )
                    return reply
                status, reply = await asyncio.to_thread(_register, service, registry, path, dry_run, owner)
                response.status_code = status
                if idempotency_key is not None and status != 202:
                    replies[reply_key] = digest, status, reply
                    while len(replies) > MAX_REPLIES:
                        del replies[next(iter(replies))]
                return reply


def _register(
    service: Service, registry: Registry, path: Path, dry_run: bool, owner: str | None
) -> tuple[int, ImportResult]:
    """Registers a bundle and waits until it is served; returns the HTTP status and the outcome."""
    try:
        received = registry.import_bundle(path, dry_run=dry_run, owner=owner)
    except RegistryError as error:  # without the path of the temporary file
        raise type(error)(str(error).replace(f" {str(path)!r}", "")) from error
    settled = dry_run or _settle(service)
    added = not dry_run and any(task.state == "added" for task in received)
    status = (201 if added else 200) if settled else 202
    snapshot, tasks = service.snapshot, []
    for task in received:
        state, reason = snapshot.state(task.ref)
        if state == "not served" and not dry_run:
            reason = "a newer version is served, or this one is retired or needs another backbone"
            if service.alias:
                reason = f"only versions with the alias {service.alias!r} are served"
        tasks.append(
            ImportedTask(
                ref=task.ref, origin=task.origin, outcome=task.state, detail=task.detail, state=state, reason=reason
            )
        )
    return status, ImportResult(generation=snapshot.generation, dry_run=dry_run, tasks=tasks)


def _settle(service: Service) -> bool:
    """Waits until the registry's current generation is served; returns False on timeout."""
    return service.follower.settle(service.registry.generation, SETTLE_S)


@router.get("/{name}/aliases/{alias}", **PREDICT, summary="An alias")
def alias(response: Response, service: Served, name: str, alias: str) -> Alias:
    """Returns the version that the alias points at, also as the ETag that changes require."""
    record = service.registry.record(f"{plain_name(name)}@{alias}")
    response.headers["ETag"] = f'"{record.version}"'
    return Alias(name=name, alias=alias, version=record.version)


@router.put("/{name}/aliases/{alias}", **_MOVE, summary="Points an alias at a version")
async def set_alias(
    response: Response,
    service: Served,
    registry: WritableRegistry,
    name: str,
    alias: str,
    target: AliasTarget,
    if_match: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Alias:
    """Moves the alias, if its state matches the precondition, and responds once the change is served.

    The precondition is `If-Match: "VERSION"` (it points at that version) or `If-None-Match: *` (it does not exist).
    """
    expected = _expected(if_match, if_none_match)
    await asyncio.to_thread(registry.set_alias, plain_name(name), alias, target.version, expected=expected)
    await _wait_until_served(service, f"'{name}@{alias}'")
    response.headers["ETag"] = f'"{target.version}"'
    return Alias(name=name, alias=alias, version=target.version)


@router.delete("/{name}/aliases/{alias}", **_MOVE, status_code=204, summary="Removes an alias")
async def remove_alias(
    service: Served, registry: WritableRegistry, name: str, alias: str, if_match: Annotated[str | None, Header()] = None
) -> None:
    """Removes the alias if it points at the version in `If-Match`, and responds once the change is served."""
    expected = _expected(if_match, None)
    await asyncio.to_thread(registry.remove_alias, plain_name(name), alias, expected=expected)
    await _wait_until_served(service, f"'{name}@{alias}'")


async def _wait_until_served(service: Service, alias: str) -> None:
    """Waits until a change of an alias is served."""
    if not await asyncio.to_thread(_settle, service):
        raise ProblemError(503, f"Alias {alias} was changed, but the change is not served yet.", {"Retry-After": "5"})


def _expected(if_match: str | None, if_none_match: str | None) -> int:
    """The version that the precondition names, 0 for none."""
    if if_none_match == "*" and if_match is None:
        return 0
    match tags(if_match or ""):
        case [tag] if if_none_match is None and re.fullmatch("[0-9]{1,9}", tag):
            return int(tag)
    raise ProblemError(
        428, 'Send If-Match: "VERSION" (the ETag of GET), or If-None-Match: * if the alias does not exist.'
    )
