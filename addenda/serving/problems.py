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
"""HTTP status of an error; the first class in its method resolution order counts."""

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
