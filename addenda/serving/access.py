"""Dependencies shared by all routes: the service, and authorization by API key, scope and origin."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from addenda.serving.keys import SCOPES, KeyFile
from addenda.serving.problems import ProblemError
from addenda.serving.service import Service

COOKIE = "addenda_key"
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Bearer = Annotated[
    HTTPAuthorizationCredentials | None,
    Security(HTTPBearer(auto_error=False, scheme_name="key", description="An API key, from `addenda keys create`.")),
]
Cookie = Annotated[str | None, Security(APIKeyCookie(name=COOKIE, auto_error=False, scheme_name="page"))]


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
        raise ProblemError(421, f"This server only serves {', '.join(LOOPBACK)}, not {host!r}.")
    origin = request.headers.get("origin")
    if origin is not None and _split(origin).netloc != host:
        raise ProblemError(403, f"Requests from pages of {origin!r} are rejected.")


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
