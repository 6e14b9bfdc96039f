"""The friendly API's changes: registering bundles, moving aliases; each is answered when it is served."""

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
from addenda.serving.bodies import BINARY, save_body, takes
from addenda.serving.problems import ProblemError, documents
from addenda.serving.service import Service

SETTLE_S = 30.0
"""How long an answer about a change waits until the change is served."""
UPLOADS = 4
"""Bundles on the disk at one time."""
MOST_REPLIES = 1000
"""Answers that are kept for requests that come again."""
_KEY = re.compile(r"[\x21-\x7e]{1,200}")

router = APIRouter(prefix="/api/v1/tasks", tags=["tasks"], responses=documents(401, 403, 404, 422, 503))
_MOVE: dict[str, Any] = {"dependencies": [needs("admin")], "responses": documents(409, 412, 428)}


def _whose(request: Request) -> str | None:
    """What a key is called in the registry's events; None where no key was asked for."""
    key: str | None = getattr(request.state, "key", None)
    return None if key is None else f"key {key}"


async def _registry(request: Request, service: Served) -> Registry:
    """The registry, which will record changes in the name of the key that asks for them."""
    whose = _whose(request)
    return service.registry if whose is None else service.registry.on_behalf_of(whose)


Changed = Annotated[Registry, Depends(_registry)]


class Taken(BaseModel):
    """What became of a task of a bundle."""

    ref: str
    origin: str
    outcome: str
    detail: str
    state: str
    reason: str | None = None


class Registered(BaseModel):
    """What became of a bundle; with `dry_run` nothing did, and this is what would."""

    generation: int
    dry_run: bool
    tasks: list[Taken]


class Alias(BaseModel):
    """Where an alias points."""

    name: str
    alias: str
    version: int


class Version(BaseModel):
    """Where an alias is to point."""

    version: Annotated[int, Query(ge=1, le=999_999_999)]


@router.post(
    "",
    dependencies=[needs("register")],
    status_code=201,
    summary="Registers a bundle",
    responses={
        200: {"model": Registered, "description": "Nothing was added: it was there already, or this was a dry run."},
        202: {"model": Registered, "description": "Registered, and not served yet."},
        **documents(400, 408, 409, 413, 415),
    },
    openapi_extra=takes({"application/octet-stream": BINARY}),
)
async def register(
    request: Request,
    response: Response,
    service: Served,
    registry: Changed,
    dry_run: Annotated[bool, Query(description="Only say what would be done.")] = False,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Registered:
    """Takes in what `addenda tasks export` wrote, wholly or not at all, and answers when it is served.

    A key that is not an admin's may bring new names, and new versions of names that it made; others' stay as they are.

    The same Idempotency-Key gives the answer that it gave, as long as the server runs; a bundle that is sent again
    without one is found to be there already.
    """
    if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
        raise ProblemError(400, "Idempotency-Key has 1 to 200 visible ASCII characters.")
    uploads: asyncio.Semaphore = request.app.state.uploads
    if uploads.locked():
        raise ProblemError(503, f"{UPLOADS} bundles are being received.", {"Retry-After": "10"})
    replies: dict[tuple[str | None, str], tuple[str, int, Registered]] = request.app.state.replies
    reply_key = (_whose(request), idempotency_key or "")
    owner = _whose(request) if getattr(request.state, "scope", "admin") == "register" else None
    async with uploads:  # as long as it lies on the disk
        with tempfile.TemporaryDirectory(prefix="addenda-") as folder:
            path = Path(folder) / "upload.addenda"
            digest = f"{await save_body(request, service.limits.bundle_bytes, path)} {dry_run}"
            async with request.app.state.registering:
                if idempotency_key is not None and reply_key in replies:
                    before, response.status_code, reply = replies[reply_key]
                    if before != digest:
                        raise ProblemError(
                            422, f"Idempotency-Key {idempotency_key!r} came with another request before."
                        )
                    return reply
                status, reply = await asyncio.to_thread(_register, service, registry, path, dry_run, owner)
                response.status_code = status
                if idempotency_key is not None and status != 202:
                    replies[reply_key] = digest, status, reply
                    while len(replies) > MOST_REPLIES:
                        del replies[next(iter(replies))]
                return reply


def _register(
    service: Service, registry: Registry, path: Path, dry_run: bool, owner: str | None
) -> tuple[int, Registered]:
    """Takes a bundle in and waits until it is served: HTTP's status, and what became of it."""
    try:
        received = registry.import_bundle(path, dry_run=dry_run, owner=owner)
    except RegistryError as error:  # whose file here is nobody's business
        raise type(error)(str(error).replace(f" {str(path)!r}", "")) from error
    settled = dry_run or _settle(service)
    added = not dry_run and any(one.state == "added" for one in received)
    status = (201 if added else 200) if settled else 202
    snapshot, taken = service.snapshot, []
    for one in received:
        state, reason = snapshot.state(one.ref)
        if state == "not served" and not dry_run:
            reason = "a newer version is served, it is retired, or it is of another backbone"
            if service.alias:
                reason = f"only what {service.alias!r} points at is served"
        taken.append(
            Taken(ref=one.ref, origin=one.origin, outcome=one.state, detail=one.detail, state=state, reason=reason)
        )
    return status, Registered(generation=snapshot.generation, dry_run=dry_run, tasks=taken)


def _settle(service: Service) -> bool:
    """Waits until the registry as it is now is served; says whether it is."""
    return service.follower.settle(service.registry.generation, SETTLE_S)


@router.get("/{name}/aliases/{alias}", **PREDICT, summary="Where an alias points")
def alias(response: Response, service: Served, name: str, alias: str) -> Alias:
    """The version is the ETag, which a change of it needs."""
    record = service.registry.record(f"{plain_name(name)}@{alias}")
    response.headers["ETag"] = f'"{record.version}"'
    return Alias(name=name, alias=alias, version=record.version)


@router.put("/{name}/aliases/{alias}", **_MOVE, summary="Points an alias at a version")
async def set_alias(
    response: Response,
    service: Served,
    registry: Changed,
    name: str,
    alias: str,
    wanted: Version,
    if_match: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Alias:
    """With `If-Match: "VERSION"` only where it points at that now, with `If-None-Match: *` only where at nothing.

    Answered when it is served.
    """
    expected = _expected(if_match, if_none_match)
    await asyncio.to_thread(registry.set_alias, plain_name(name), alias, wanted.version, expected=expected)
    await _serve_change(service, f"'{name}@{alias}'")
    response.headers["ETag"] = f'"{wanted.version}"'
    return Alias(name=name, alias=alias, version=wanted.version)


@router.delete("/{name}/aliases/{alias}", **_MOVE, status_code=204, summary="Takes an alias away")
async def remove_alias(
    service: Served, registry: Changed, name: str, alias: str, if_match: Annotated[str | None, Header()] = None
) -> None:
    """With `If-Match: "VERSION"`: only where it points at that now. Answered when it is served."""
    expected = _expected(if_match, None)
    await asyncio.to_thread(registry.remove_alias, plain_name(name), alias, expected=expected)
    await _serve_change(service, f"'{name}@{alias}'")


async def _serve_change(service: Service, what: str) -> None:
    """Waits until a change that was made is served."""
    if not await asyncio.to_thread(_settle, service):
        raise ProblemError(503, f"{what} was changed, and the change is not served yet.", {"Retry-After": "5"})


def _expected(if_match: str | None, if_none_match: str | None) -> int:
    """The version that an alias must point at, 0 for none."""
    if if_none_match == "*" and if_match is None:
        return 0
    match tags(if_match or ""):
        case [tag] if if_none_match is None and re.fullmatch("[0-9]{1,9}", tag):
            return int(tag)
    raise ProblemError(
        428, 'Say what the alias points at now: If-Match: "VERSION" (the ETag of GET), or If-None-Match: * for nothing.'
    )
