"""What every route asks first: the service, and who may do what by keys, scopes and origins."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from addenda.serving.keys import Key, KeyFile
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
    """Lets a request through whose key allows what the route asks for; without a file of keys all on this machine may.

    A cookie, which a browser sends by itself, counts only for requests that come from the server's own pages.
    """
    check_origin(request)
    if open_to_all(request):
        return
    found = key_of(request, bearer.credentials if bearer else cookie)
    if found is None:
        said = "A valid API key is needed: Authorization: Bearer KEY."
        raise ProblemError(401, said, {"WWW-Authenticate": "Bearer"})
    request.state.key, request.state.scope = found.name, found.scope
    for scope in scopes.scopes:
        if not found.allows(scope):
            raise ProblemError(403, f"The key {found.name!r} allows {found.scope!r}; this needs {scope!r}.")


def open_to_all(request: Request) -> bool:
    """Whether no key is asked for: there never was a file of keys, and only this machine can ask."""
    keys: KeyFile | None = request.app.state.keys
    return request.app.state.loopback and (keys is None or not keys.guards)


def key_of(request: Request, text: str | None) -> Key | None:
    """The key that was given, if it is one."""
    keys: KeyFile | None = request.app.state.keys
    return keys.find(text) if text and keys is not None else None


def check_origin(request: Request) -> None:
    """Refuses what a browser sends from another site's page, or by a name that is made to point here."""
    host = request.headers.get("host", "")
    if request.app.state.loopback and _place(f"//{host}").hostname not in LOOPBACK:
        raise ProblemError(421, f"This server answers on {', '.join(LOOPBACK)} only, not as {host!r}.")
    origin = request.headers.get("origin")
    if origin is not None and _place(origin).netloc != host:
        raise ProblemError(403, f"Requests from pages of {origin!r} are refused.")


def _place(url: str) -> SplitResult:
    """The parts of a URL; none where it is not one."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


async def service_of(request: Request) -> Service:
    """The service that the application answers with."""
    service: Service = request.app.state.service
    return service


Served = Annotated[Service, Depends(service_of)]


def needs(scope: str) -> Any:
    """The dependency of a route that needs a scope."""
    return Security(check, scopes=[scope])
