"""Errors as problem documents (RFC 9457)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http.client import responses
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from addenda.exceptions import (
    AddendaError,
    BackboneError,
    ConflictError,
    DataError,
    DeadlineError,
    IntegrityError,
    KeyFileError,
    NameTakenError,
    OverloadedError,
    OwnershipError,
    RegistryError,
    RegistryFaultError,
    RegistryUnavailableError,
    TooLargeError,
    UnknownTaskError,
)

MEDIA_TYPE = "application/problem+json"
STATUS: dict[type[AddendaError], int] = {
    TooLargeError: 413,
    DataError: 400,
    BackboneError: 400,
    UnknownTaskError: 404,
    NameTakenError: 409,
    ConflictError: 412,
    OwnershipError: 403,
    IntegrityError: 422,
    RegistryUnavailableError: 503,
    RegistryFaultError: 500,
    RegistryError: 409,
    OverloadedError: 503,
    DeadlineError: 504,
}
"""By the first of an error's classes that stands here."""

log = logging.getLogger(__name__)


class ProblemError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: HTTP's.
        detail: what was asked, what was found, what to do.
        headers: to send along.
        more: further members of the document.
    """

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] | None = None, more: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.more = status, detail, dict(headers or {}), dict(more or {})


def documents(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of answers that are problem documents."""
    schema = {"type": "object", "required": ["type", "title", "status", "detail"]}
    content = {MEDIA_TYPE: {"schema": schema}}
    return {status: {"description": responses[status], "content": content} for status in statuses}


def problem_of(error: AddendaError | RequestValidationError) -> ProblemError:
    """The problem that an error of this library is, or of FastAPI's about what was asked."""
    if isinstance(error, RequestValidationError):
        faults = [{"at": [str(at) for at in one["loc"]], "said": one["msg"]} for one in error.errors()]
        said = "; ".join(f"{'.'.join(fault['at'])}: {fault['said']}" for fault in faults)
        return ProblemError(422, said, more={"errors": faults})
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, RegistryUnavailableError):
        headers["Retry-After"] = "5"
    return ProblemError(status, str(error), headers)


def response(request: Request, problem: ProblemError) -> JSONResponse:
    """The problem document; its `error` member is what the Open Inference Protocol calls for."""
    request_id = getattr(request.state, "id", None)
    document = {
        "type": "about:blank",
        "title": responses.get(problem.status, "Client Closed Request"),
        "status": problem.status,
        "detail": problem.detail,
        "instance": request.url.path,
        "error": problem.detail,
        "request_id": request_id,
        **problem.more,
    }
    return JSONResponse(document, problem.status, problem.headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Has an application answer every error with a problem document."""

    @app.exception_handler(ProblemError)
    async def _problem(request: Request, error: ProblemError) -> JSONResponse:
        return response(request, error)

    @app.exception_handler(KeyFileError)
    async def _keys(request: Request, error: KeyFileError) -> JSONResponse:
        log.error("Whoever needs a key is refused: %s", error)
        return response(request, ProblemError(503, "The server cannot read its keys; its log says why."))

    @app.exception_handler(AddendaError)
    async def _ours(request: Request, error: AddendaError) -> JSONResponse:
        problem = problem_of(error)
        if problem.status == 500:
            log.error("Request %s failed", request.state.id, exc_info=error)
        return response(request, problem)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return response(request, problem_of(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return response(request, ProblemError(error.status_code, str(error.detail), error.headers))

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        log.error("Request %s failed", request.state.id, exc_info=error)
        said = "The server failed; its log says how, under this request's id."
        return response(request, ProblemError(500, said, {"X-Request-Id": request.state.id}))

    @app.exception_handler(OSError)
    async def _system(request: Request, error: OSError) -> JSONResponse:
        log.error("Request %s failed for want of what the system gives", request.state.id, exc_info=error)
        said = "The server's system refuses what it needs, a full disk or a folder that is gone; its log says what."
        return response(request, ProblemError(503, said, {"Retry-After": "60"}))
