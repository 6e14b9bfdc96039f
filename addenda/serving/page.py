"""The web pages: served tasks, task details, exactness and login."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel

from addenda.exceptions import AddendaError, RegistryError, UnknownTaskError
from addenda.registry import TaskFilter, TaskRecord, check_name, headline
from addenda.serving import page_charts
from addenda.serving.routes import (
    BINARY,
    COOKIE,
    ProblemError,
    Served,
    body_schema,
    check_origin,
    needs,
    open_to_all,
    problem_of,
    problem_responses,
    read_body,
    read_images,
    while_connected,
)
from addenda.serving.service import Service
from addenda.terminal import PER_CLASS, SCORES, percent, size

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers submit forms with `Origin: null`
    "Cache-Control": "no-cache",
}
ASSETS = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
MAX_EVENTS = 50
MAX_VERSIONS = 100


class PageRoute(APIRoute):
    """A route for browsers: it adds a CSP, renders errors as pages and redirects to the login if a key is missing."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wraps the route's handler."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                response = await handler(request)
            except (ProblemError, AddendaError, RequestValidationError) as error:
                problem = problem_of(error, request)
                if problem.status == 401:
                    response = RedirectResponse("/login", 303)
                else:
                    response = _render(request, "error.html", problem.status, problem=problem)
            response.headers.update(HEADERS)
            return response

        return handle


router, plain = APIRouter(tags=["page"], route_class=PageRoute), APIRouter(tags=["page"])
_PREDICT = [needs("predict")]
_PUBLIC = [Depends(check_origin)]
_PAGE: dict[str, Any] = {
    "response_class": HTMLResponse,
    "responses": {303: {"description": "Redirect to the login, if a key is required."}},
}
_TASK_ERRORS = {404: {"description": "Unknown task."}, 422: {"description": "The version is not an integer."}}
_KEY_FORM = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
_TASK_PAGE = {**_PAGE, "responses": _PAGE["responses"] | _TASK_ERRORS}


@router.get("/", dependencies=_PREDICT, summary="Page: served tasks", **_PAGE)
def home(request: Request) -> Response:
    """Lists the served tasks and takes an image to predict for."""
    return _render(request, "home.html")


@router.get("/page/tasks", dependencies=_PREDICT, summary="Page fragment: list of served tasks", **_PAGE)
def tasks(request: Request) -> Response:
    """Returns the part of the home page that changes with the generation."""
    return _render(request, "tasks.html")


@router.get("/tasks/{name}", dependencies=_PREDICT, summary="Page: a task", **_TASK_PAGE)
def task(request: Request, service: Served, name: str) -> Response:
    """Shows the served version of a task, or else its newest one."""
    served = service.snapshot.records.get(name)
    return _task_page(request, service, name, served.version if served else None)


@router.get("/tasks/{name}/versions/{version}", dependencies=_PREDICT, summary="Page: a task version", **_TASK_PAGE)
def task_version(request: Request, service: Served, name: str, version: int) -> Response:
    """Shows one version of a task."""
    return _task_page(request, service, name, version)


@router.get("/exactness", dependencies=_PREDICT, summary="Page: exactness", **_PAGE)
def exactness(request: Request, service: Served) -> Response:
    """Shows the exactness guarantee, its verifications, and the numerics of this server."""
    snapshot = service.snapshot
    return _render(request, "exactness.html", numerics=snapshot.numerics, fingerprint=snapshot.numerics_fingerprint)


@router.get("/login", dependencies=_PUBLIC, summary="Page: login", **_PAGE)
def login(request: Request) -> Response:
    """Asks for an API key, if keys are required."""
    if open_to_all(request):
        return RedirectResponse("/", 303)
    return _render(request, "login.html", invalid=False)


@router.post(
    "/login",
    dependencies=_PUBLIC,
    summary="Page: log in",
    response_class=HTMLResponse,
    responses={303: {"description": "Redirect to the tasks."}, 403: {"description": "Invalid key."}},
    openapi_extra=body_schema({"application/x-www-form-urlencoded": _KEY_FORM}),
)
async def enter(request: Request) -> Response:
    """Stores the key from the form in an HttpOnly, SameSite=strict cookie."""
    form = parse_qs((await read_body(request, 4096)).decode("utf-8", "replace"))
    key = form.get("key", [""])[0].strip()
    response = RedirectResponse("/", 303)
    if not open_to_all(request):
        if request.app.state.keys.find(key) is None:
            return _render(request, "login.html", 403, invalid=True)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=secure)
    return response


@router.post(
    "/logout",
    dependencies=_PUBLIC,
    summary="Page: log out",
    status_code=303,
    response_class=RedirectResponse,
    responses={303: {"description": "Redirect to the login."}},
)
async def leave(request: Request) -> Response:
    """Deletes the cookie."""
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return response


@router.get(
    "/static/{asset}",
    dependencies=_PUBLIC,
    summary="Page: stylesheet, script and icon",
    response_class=Response,
    responses={404: {"description": "Unknown asset."}},
)
def static(request: Request, asset: str) -> Response:
    """Returns a static asset of the pages."""
    if asset not in ASSETS:
        raise ProblemError(404, f"There is no asset {asset!r}.")
    return Response((files(__package__) / "static" / asset).read_bytes(), media_type=ASSETS[asset])


class Attention(BaseModel):
    """The attention of a task's class token over the patches of an image.

    Attributes:
        rows: number of patch rows.
        columns: number of patch columns.
        weights: one weight per patch, in row-major order; their sum is at most 1.
        box: the image area that the patches cover, as fractions of its width and height: left, top, width, height.
    """

    generation: int
    task: str
    ref: str
    rows: int
    columns: int
    weights: list[float]
    box: tuple[float, float, float, float]


@plain.post(
    "/page/attention",
    dependencies=[needs("predict")],
    summary="Attention of a task's class token",
    responses=problem_responses(400, 404, 409, 413, 503, 504),
    openapi_extra=body_schema(dict.fromkeys(("image/jpeg", "image/png", "image/webp"), BINARY)),
)
async def attention(
    request: Request, service: Served, task: Annotated[str, Query(description="The task's name.")]
) -> Attention:
    """Computes the class token's attention over an image's patches in the last layer, averaged over heads."""
    image = await read_images(request, service)
    snapshot, weights, size = await while_connected(request, service.attention(image, task))
    rows, columns = weights.shape
    return Attention(
        generation=snapshot.generation,
        task=task,
        ref=snapshot.records[task].ref,
        rows=rows,
        columns=columns,
        weights=weights.flatten().tolist(),
        box=seen_box(service.backbone.preprocessing, *size),
    )


def _task_page(request: Request, service: Service, name: str, version: int | None) -> Response:
    registry, snapshot = service.registry, service.snapshot
    try:
        check_name(name)
    except RegistryError as error:
        raise UnknownTaskError(str(error)) from error
    versions = registry.tasks(TaskFilter(name=name, retired=True), limit=MAX_VERSIONS)[::-1]
    if version is None and versions:
        version = next((each.version for each in versions if each.retired is None), versions[0].version)
    record = registry.record(name if version is None else f"{name}:{version}")
    split = "test" if record.metrics.get("test") else "validation"
    scores = record.metrics.get(split) or {}
    served = snapshot.records.get(name)
    return _render(
        request,
        "task.html",
        record=record,
        versions=versions,
        served=served.ref if served else None,
        quarantine_reason=snapshot.quarantined.get(record.ref),
        split=split,
        scores=scores,
        classes=page_charts.per_class(scores, record.labels),
        per_class=PER_CLASS[record.objective][0],
        confusion=page_charts.confusion(scores, record.labels),
        curves=page_charts.curves(record.metrics),
        graph=page_charts.graph(registry.lineage(record.ref)),
        history=registry.history(name)[::-1],
        events=registry.events(name, limit=MAX_EVENTS)[::-1],
        config=json.dumps(record.config, indent=2, ensure_ascii=False),
    )


def _render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    service: Service = request.app.state.service
    page = _templates.get_template(template).render(
        path=request.url.path,
        snapshot=service.snapshot,
        alias=service.alias,
        reachable=service.follower.reachable,
        keys_required=not open_to_all(request),
        charts=page_charts,
        metric_names=SCORES,
        **values,
    )
    return HTMLResponse(page, status)


def seen_box(preprocessing: Mapping[str, Any], width: int, height: int) -> tuple[float, float, float, float]:
    """The area of an image that the backbone sees after timm's resizing; exceeds 0 to 1 where the image is padded."""
    _, rows, columns = preprocessing["input_size"]
    resized_height, resized_width = (math.floor(size / preprocessing["crop_pct"]) for size in (rows, columns))
    if preprocessing["crop_mode"] != "squash":
        select = min if preprocessing["crop_mode"] == "border" else max
        scale = select(resized_width / width, resized_height / height)
        resized_width, resized_height = scale * width, scale * height
    box_width, box_height = columns / resized_width, rows / resized_height
    return (1 - box_width) / 2, (1 - box_height) / 2, box_width, box_height


def _score(record: TaskRecord) -> str:
    """The headline score as text, with its name if it is not accuracy."""
    if record.score is None:
        return "–"
    name = SCORES[record.objective][headline(record.objective)]
    split = "" if "test" in record.metrics else " (validation)"
    return f"{percent(record.score)} %{'' if name == 'accuracy' else f' {name}'}{split}"


def _age(at: str) -> str:
    """The age of an ISO 8601 time: 40 s, 5 min, 3 h, 12 days."""
    try:
        seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds())
    except (ValueError, TypeError):  # stored before times were validated
        return at
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


_templates = Environment(
    loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_templates.filters |= {"percent": percent, "size": size, "score": _score, "age": _age}
_templates.filters["when"] = lambda at: f"{at[:16].replace('T', ' ')} UTC"
