"""Errors as problem documents (RFC 9457)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http.client import responses
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from addenda import exceptions
from addenda.exceptions import AddendaError, KeyFileError

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
"""By the first of an error's classes that stands here."""

log = logging.getLogger(__name__)


class ProblemError(Exception):
    """What a client is told instead of an answer: HTTP's status, the words, headers, more members of the document."""

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
    if isinstance(error, exceptions.OverloadedError):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, exceptions.RegistryUnavailableError):
        headers["Retry-After"] = "5"
    return ProblemError(status, str(error), headers)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    """The problem document; its `error` member is what the Open Inference Protocol calls for."""
    request_id = getattr(request.state, "id", None)
    match error:
        case ProblemError():
            problem = error
        case HTTPException():
            problem = ProblemError(error.status_code, str(error.detail), error.headers)
        case KeyFileError():
            log.error("Whoever needs a key is refused: %s", error)
            problem = ProblemError(503, "The server cannot read its keys; its log says why.")
        case AddendaError() | RequestValidationError():
            problem = problem_of(error)
            if problem.status == 500:
                log.error("Request %s failed", request_id, exc_info=error)
        case OSError():
            log.error("Request %s failed for want of what the system gives", request_id, exc_info=error)
            said = "The server's system refuses what it needs, a full disk or a folder that is gone; its log says what."
            problem = ProblemError(503, said, {"Retry-After": "60"})
        case _:
            log.error("Request %s failed", request_id, exc_info=error)
            said = "The server failed; its log says how, under this request's id."
            problem = ProblemError(500, said, {"X-Request-Id": request_id or ""})
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


HANDLERS: dict[int | type[Exception], Any] = dict.fromkeys(
    (ProblemError, AddendaError, RequestValidationError, HTTPException, OSError, Exception), _answer
)
"""Every error is answered with a problem document."""
