"""The pages: what is served, what each task is, whether it kept its promise, and the way in."""

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

from addenda.combined import numerics, numerics_fingerprint
from addenda.exceptions import AddendaError, RegistryError, UnknownTaskError
from addenda.registry import TaskFilter, TaskRecord, check_name, headline
from addenda.serving import page_charts
from addenda.serving.access import COOKIE, Served, check_origin, key_of, needs, open_to_all
from addenda.serving.bodies import BINARY, read_body, read_images, takes, while_connected
from addenda.serving.problems import ProblemError, documents, problem_of
from addenda.serving.service import Service
from addenda.terminal import PER_CLASS, SCORES, percent, size

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # under no-referrer browsers send a form with `Origin: null`
    "Cache-Control": "no-cache",
}
ASSETS = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
MOST_EVENTS = 50
MOST_VERSIONS = 100


class PageRoute(APIRoute):
    """A route for browsers: its errors are pages too, who has no key is sent to the login, and CSP stands on all."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with all that."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await handler(request)
            except (ProblemError, AddendaError, RequestValidationError) as error:
                problem = error if isinstance(error, ProblemError) else problem_of(error)
                if problem.status == 401:
                    response = RedirectResponse("/login", 303)
                else:
                    response = _render(request, "error.html", problem.status, problem=problem)
            response.headers.update(HEADERS)
            return response

        return answer


router, plain = APIRouter(tags=["page"], route_class=PageRoute), APIRouter(tags=["page"])
_PREDICT = [needs("predict")]
_ANYBODY = [Depends(check_origin)]
_PAGE: dict[str, Any] = {
    "response_class": HTMLResponse,
    "responses": {303: {"description": "To the login, where a key is needed."}},
}
_WRONG = {404: {"description": "There is no such task."}, 422: {"description": "Its version is no whole number."}}
_KEY_FORM = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
_TASK_PAGE = {**_PAGE, "responses": _PAGE["responses"] | _WRONG}


@router.get("/", dependencies=_PREDICT, summary="PageRoute: what is served", **_PAGE)
def home(request: Request) -> Response:
    """All tasks that are served, and a place for an image."""
    return _render(request, "home.html")


@router.get("/page/tasks", dependencies=_PREDICT, summary="PageRoute: the part of it that lists the tasks", **_PAGE)
def tasks(request: Request) -> Response:
    """The part of the page that changes with the generation."""
    return _render(request, "tasks.html")


@router.get("/tasks/{name}", dependencies=_PREDICT, summary="PageRoute: a task", **_TASK_PAGE)
def task(request: Request, service: Served, name: str) -> Response:
    """The version of a task that is served, else its newest."""
    served = service.snapshot.records.get(name)
    return _task_page(request, service, name, served.version if served else None)


@router.get(
    "/tasks/{name}/versions/{version}", dependencies=_PREDICT, summary="PageRoute: a task's version", **_TASK_PAGE
)
def task_version(request: Request, service: Served, name: str, version: int) -> Response:
    """One version of a task."""
    return _task_page(request, service, name, version)


@router.get("/exactness", dependencies=_PREDICT, summary="PageRoute: whether the promise is kept", **_PAGE)
def exactness(request: Request, service: Served) -> Response:
    """The promise, its verification, and what bits depend on here."""
    described = numerics(service.backbone)
    return _render(request, "exactness.html", numerics=described, fingerprint=numerics_fingerprint(described))


@router.get("/login", dependencies=_ANYBODY, summary="PageRoute: the way in", **_PAGE)
def login(request: Request) -> Response:
    """Asks for a key, where keys are used."""
    if open_to_all(request):
        return RedirectResponse("/", 303)
    return _render(request, "login.html", wrong=False)


@router.post(
    "/login",
    dependencies=_ANYBODY,
    summary="PageRoute: keeps a key in a cookie",
    response_class=HTMLResponse,
    responses={303: {"description": "To the tasks."}, 403: {"description": "It is no valid key."}},
    openapi_extra=takes({"application/x-www-form-urlencoded": _KEY_FORM}),
)
async def enter(request: Request) -> Response:
    """A key from a form becomes a cookie that no script sees and that only this server's own pages send."""
    form = parse_qs((await read_body(request, 4096)).decode("utf-8", "replace"))
    key = form.get("key", [""])[0].strip()
    response = RedirectResponse("/", 303)
    if not open_to_all(request):
        if key_of(request, key) is None:
            return _render(request, "login.html", 403, wrong=True)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=secure)
    return response


@router.post(
    "/logout",
    dependencies=_ANYBODY,
    summary="PageRoute: forgets the key",
    status_code=303,
    response_class=RedirectResponse,
    responses={303: {"description": "To the login."}},
)
async def leave(request: Request) -> Response:
    """Takes the cookie away."""
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return response


@router.get(
    "/static/{asset}",
    dependencies=_ANYBODY,
    summary="PageRoute: its style, script and icon",
    response_class=Response,
    responses={404: {"description": "There is no such asset."}},
)
def static(request: Request, asset: str) -> Response:
    """An asset of the pages."""
    if asset not in ASSETS:
        raise ProblemError(404, f"There is no asset {asset!r}.")
    return Response((files(__package__) / "static" / asset).read_bytes(), media_type=ASSETS[asset])


class Attention(BaseModel):
    """Where a task's token looked.

    Attributes:
        rows: of patches.
        columns: of patches.
        weights: of each patch, row by row; together at most 1.
        box: what of the image the patches cover, in shares of its width and height: left, top, width, height.
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
    summary="Where a task's token looked",
    responses=documents(400, 404, 409, 413, 503, 504),
    openapi_extra=takes(dict.fromkeys(("image/jpeg", "image/png", "image/webp"), BINARY)),
)
async def attention(
    request: Request, service: Served, task: Annotated[str, Query(description="The task's name.")]
) -> Attention:
    """Attention of the task's own token over an image's patches in the last layer, the mean over heads."""
    image = await read_images(request, service)
    snapshot, weights, size = await while_connected(request, service.look(image, task))
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
    versions = registry.tasks(TaskFilter(name=name, retired=True), limit=MOST_VERSIONS)[::-1]
    if version is None and versions:
        version = next((one.version for one in versions if one.retired is None), versions[0].version)
    record = registry.record(name if version is None else f"{name}:{version}")
    part = "test" if record.metrics.get("test") else "validation"
    scores = record.metrics.get(part) or {}
    served = snapshot.records.get(name)
    return _render(
        request,
        "task.html",
        record=record,
        versions=versions,
        served=served.ref if served else None,
        why=snapshot.quarantined.get(record.ref),
        part=part,
        scores=scores,
        classes=page_charts.per_class(scores, record.labels),
        per_class=PER_CLASS[record.objective][0],
        confusion=page_charts.confusion(scores, record.labels),
        curves=page_charts.curves(record.metrics),
        graph=page_charts.graph(registry.lineage(record.ref)),
        history=registry.history(name)[::-1],
        events=registry.events(name, limit=MOST_EVENTS)[::-1],
        config=json.dumps(record.config, indent=2, ensure_ascii=False),
    )


def _render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    service: Service = request.app.state.service
    page = _templates.get_template(template).render(
        path=request.url.path,
        snapshot=service.snapshot,
        alias=service.alias,
        reachable=service.follower.reachable,
        keys=not open_to_all(request),
        charts=page_charts,
        names=SCORES,
        **values,
    )
    return HTMLResponse(page, status)


def seen_box(preprocessing: Mapping[str, Any], width: int, height: int) -> tuple[float, float, float, float]:
    """The box of an image that the backbone sees after timm's resizing; beyond 0 and 1 where the image is padded."""
    _, rows, columns = preprocessing["input_size"]
    tall, wide = (math.floor(size / preprocessing["crop_pct"]) for size in (rows, columns))
    if preprocessing["crop_mode"] != "squash":
        pick = min if preprocessing["crop_mode"] == "border" else max
        scale = pick(wide / width, tall / height)
        wide, tall = scale * width, scale * height
    across, down = columns / wide, rows / tall
    return (1 - across) / 2, (1 - down) / 2, across, down


def _score(record: TaskRecord) -> str:
    """The headline score; its name where it is no accuracy."""
    if record.score is None:
        return "–"
    name = SCORES[record.objective][headline(record.objective)]
    return f"{percent(record.score)} %{'' if name == 'accuracy' else f' {name}'}"


def _age(at: str) -> str:
    """How long ago a time in ISO 8601 was: 40 s, 5 min, 3 h, 12 days."""
    try:
        seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds())
    except (ValueError, TypeError):  # from before such were refused
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
