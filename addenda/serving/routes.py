"""What all routes share: error documents (RFC 9457), authorization, and reading bodies within limits."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import zlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from http.client import responses
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from fastapi import Depends, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from addenda import exceptions
from addenda.exceptions import AddendaError, KeyFileError, TooLargeError
from addenda.serving.keys import SCOPES, KeyFile
from addenda.serving.service import Service
from addenda.serving.shared import Quota

MEDIA_TYPE = "application/problem+json"
STATUS: dict[type[AddendaError], int] = {
    exceptions.TooLargeError: 413,
    exceptions.DataError: 400,
    exceptions.BackboneError: 400,
    exceptions.UnknownTaskError: 404,
    exceptions.NameTakenError: 409,
    exceptions.ConflictError: 412,
    exceptions.OwnershipError: 403,
    exceptions.IntegrityError: 422,
    exceptions.RegistryUnavailableError: 503,
    exceptions.RegistryFaultError: 500,
    exceptions.RegistryError: 409,
    exceptions.OverloadedError: 503,
    exceptions.DeadlineError: 504,
}
"""HTTP status of an error; the first class in its method resolution order counts."""
COOKIE = "addenda_key"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_S = 60
"""Time limit for receiving a body, in seconds."""
GONE = "The client disconnected."
BINARY = {"type": "string", "format": "binary"}
"""The OpenAPI schema of bytes."""
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}

Result = TypeVar("Result")
Bearer = Annotated[
    HTTPAuthorizationCredentials | None,
    Security(HTTPBearer(auto_error=False, scheme_name="key", description="An API key, from `addenda keys create`.")),
]
Cookie = Annotated[str | None, Security(APIKeyCookie(name=COOKIE, auto_error=False, scheme_name="page"))]

log = logging.getLogger(__name__)


class ProblemError(Exception):
    """An error response: HTTP status, detail, headers, and further members of the problem document."""

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] | None = None, more: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.more = status, detail, dict(headers or {}), dict(more or {})


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI responses of routes that return problem documents."""
    schema = {"type": "object", "required": ["type", "title", "status", "detail"]}
    content = {MEDIA_TYPE: {"schema": schema}}
    return {status: {"description": responses[status], "content": content} for status in statuses}


def problem_of(error: Exception, request: Request) -> ProblemError:
    """Converts any error to an error response, and logs it if the server is at fault."""
    request_id = getattr(request.state, "id", None)
    match error:
        case ProblemError():
            return error
        case HTTPException():
            return ProblemError(error.status_code, str(error.detail), error.headers)
        case RequestValidationError():
            faults = [{"at": list(map(str, fault["loc"])), "said": fault["msg"]} for fault in error.errors()]
            detail = "; ".join(f"{'.'.join(fault['at'])}: {fault['said']}" for fault in faults)
            return ProblemError(422, detail, more={"errors": faults})
        case KeyFileError():
            log.error("The key file cannot be read; requests that require a key are rejected: %s", error)
            return ProblemError(503, "The server cannot read its key file. See the server's log.")
        case AddendaError():
            status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
            if status == 500:
                log.error("Request %s failed", request_id, exc_info=error)
            retry_after_s = getattr(error, "retry_after_s", 5)
            return ProblemError(status, str(error), {"Retry-After": str(retry_after_s)} if status == 503 else None)
        case OSError():
            log.error("Request %s failed with a system error", request_id, exc_info=error)
            detail = "System error on the server, such as a full disk or a missing folder. See its log."
            return ProblemError(503, detail, {"Retry-After": "60"})
    log.error("Request %s failed", request_id, exc_info=error)
    detail = "Internal server error. The server's log has it under this request's id."
    return ProblemError(500, detail, {"X-Request-Id": request_id or ""})


async def _respond(request: Request, error: Exception) -> JSONResponse:
    """Returns the problem document; its `error` member is required by the Open Inference Protocol."""
    problem = problem_of(error, request)
    document = {
        "type": "about:blank",
        "title": responses.get(problem.status, "Client Closed Request"),
        "status": problem.status,
        "detail": problem.detail,
        "instance": request.url.path,
        "error": problem.detail,
        "request_id": getattr(request.state, "id", None),
        **problem.more,
    }
    return JSONResponse(document, problem.status, problem.headers, MEDIA_TYPE)


HANDLERS: dict[int | type[Exception], Any] = dict.fromkeys(
    (ProblemError, AddendaError, RequestValidationError, HTTPException, OSError, Exception), _respond
)
"""Exception handlers: every error becomes a problem document."""


async def check(request: Request, scopes: SecurityScopes, bearer: Bearer, cookie: Cookie) -> None:
    """Rejects a request whose key lacks a required scope; a loopback server without a key file requires no key.

    Browsers send the cookie by themselves, so requests from other sites' pages are rejected first. `request.state` gets
    the key's scope and `user`, as the registry's events name its holder (None if no key was required).
    """
    check_origin(request)
    if open_to_all(request):
        request.state.user, request.state.scope = None, SCOPES[-1]
        return
    keys: KeyFile = request.app.state.keys
    presented = bearer.credentials if bearer else cookie
    key = keys.find(presented) if presented else None
    if key is None:
        detail = "A valid API key is required: Authorization: Bearer KEY."
        raise ProblemError(401, detail, {"WWW-Authenticate": "Bearer"})
    request.state.key, request.state.user, request.state.scope = key.name, f"key {key.name}", key.scope
    for scope in scopes.scopes:
        if not key.allows(scope):
            raise ProblemError(403, f"Key {key.name!r} has scope {key.scope!r}; this request requires {scope!r}.")


def open_to_all(request: Request) -> bool:
    """Whether no key is required: the server is on loopback and its key file has never existed."""
    return bool(request.app.state.loopback and not request.app.state.keys.guards)


def check_origin(request: Request) -> None:
    """Rejects cross-origin requests, and on loopback requests under any other host name (DNS rebinding)."""
    host = request.headers.get("host", "")
    if request.app.state.loopback and _split(f"//{host}").hostname not in LOOPBACK:
        raise ProblemError(
            421,
            f"This server only answers as {', '.join(LOOPBACK)}, not {host!r}; behind a proxy, start it with another "
            "--host.",
        )
    origin = request.headers.get("origin")
    if origin is not None and _split(origin).netloc != host:
        raise ProblemError(
            403, f"Requests from pages of {origin!r} to host {host!r} are rejected; a proxy must forward Host."
        )


def _split(url: str) -> SplitResult:
    """The parts of a URL; all empty if it cannot be parsed."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


async def service_of(request: Request) -> Service:
    """The application's service."""
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(service_of)]


def needs(scope: str) -> Any:
    """The dependency of a route that requires a key with this scope."""
    return Security(check, scopes=[scope])


def body_schema(schemas: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The OpenAPI request body of a route that reads the body itself, from a schema for each media type."""
    content = {media_type: {"schema": schema} for media_type, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


async def read_body(request: Request, limit: int) -> bytes:
    """Reads and decompresses a request's body; it counts towards the memory limit of all bodies until the response."""
    bodies: Quota = request.app.state.bodies
    body = bytearray()
    async for chunk in _chunks(request, limit):
        if not bodies.take(len(chunk)):
            detail = f"The bodies of all current requests exceed {bodies.limit // 2**20} MiB. Try again later."
            raise ProblemError(503, detail, {"Retry-After": "1"})
        body += chunk
        request.state.body_bytes = len(body)
    return bytes(body)


async def read_images(request: Request, service: Service) -> bytes:
    """Reads a body of images, or rejects the request at once if the queue is full."""
    with service.batcher.reserve(1):
        pass
    return await read_body(request, service.limits.body_bytes)


async def save_body(request: Request, limit: int, path: Path) -> str:
    """Streams a body to a file and returns its SHA-256."""
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        async for chunk in _chunks(request, limit):
            sha256.update(chunk)
            file.write(chunk)
    return sha256.hexdigest()


async def _chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body as it arrives, decompressed; `limit` is in bytes, before and after decompression."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", *_WINDOWS):
        raise ProblemError(415, f"Content-Encoding {encoding!r} is not supported. Supported: {', '.join(_WINDOWS)}.")
    too_large = TooLargeError(f"The request's body exceeds {limit} bytes.")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    inflate = zlib.decompressobj(_WINDOWS[encoding]) if encoding in _WINDOWS else None
    size, deadline, chunks = 0, asyncio.get_running_loop().time() + BODY_S, aiter(request.stream())
    try:
        while True:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            if inflate is not None:
                chunk = inflate.decompress(chunk, limit + 1)
            size += len(chunk)
            if size > limit:
                raise too_large
            yield chunk
            if inflate is not None and inflate.unused_data:
                raise zlib.error("trailing data")
        if inflate is not None and not inflate.eof:
            raise zlib.error("truncated")
    except TimeoutError as error:
        raise ProblemError(408, f"The request's body did not arrive within {BODY_S} s.") from error
    except ClientDisconnect as error:
        raise ProblemError(499, GONE) from error  # for the log only
    except zlib.error as error:
        raise ProblemError(400, f"The request's body is not one valid {encoding} stream.") from error


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits `work` for a request whose body has been read, and cancels it when the client disconnects."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ProblemError(499, GONE)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
