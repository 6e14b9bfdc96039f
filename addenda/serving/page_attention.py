"""Where a task's token looked in an image, for the page to draw."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from addenda.backbones import FrozenBackbone, read_image
from addenda.combined import attention_map
from addenda.exceptions import DeadlineError, UnknownTaskError
from addenda.registry import Task
from addenda.serving.access import needs
from addenda.serving.bodies import read_body, while_connected
from addenda.serving.service import FORMATS, Service
from addenda.serving.snapshot import Snapshot

router = APIRouter(tags=["page"])

_looking = ThreadPoolExecutor(1, thread_name_prefix="addenda-looking")


class Attention(BaseModel):
    """Where a task's token looked.

    Attributes:
        generation: the registry's, that was served.
        task: its name.
        ref: its name and version.
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


@router.post(
    "/page/attention",
    dependencies=[needs("predict")],
    summary="Where a task's token looked",
    responses={
        code: {"description": said}
        for code, said in {
            400: "No readable image.",
            404: "The task is not served.",
            409: "The task is head-only: it has no token.",
            413: "Too large.",
            503: "Too many images wait.",
            504: "The time was over.",
        }.items()
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": {"type": "string", "format": "binary"}}
                for kind in ("image/jpeg", "image/png", "image/webp")
            },
        }
    },
)
async def attention(request: Request, task: Annotated[str, Query(description="The task's name.")]) -> Attention:
    """Attention of the task's own token over an image's patches in the last layer, the mean over heads."""
    service: Service = request.app.state.service
    snapshot = service.snapshot
    if task not in snapshot.model.tasks:
        raise UnknownTaskError(f"Task {task!r} is not served.")
    data = await read_body(request, service.limits.body_bytes)
    return await while_connected(request, _answer(service, snapshot, snapshot.model.tasks[task], data))


async def _answer(service: Service, snapshot: Snapshot, task: Task, data: bytes) -> Attention:
    """Takes a place in the queue of images, so that these do not pile up beside it; one at a time is computed."""
    loop = asyncio.get_running_loop()
    with service.batcher.room(1):
        try:
            async with asyncio.timeout(service.limits.timeout_s):
                pixels = service.limits.pixels
                found = await loop.run_in_executor(_looking, _look, service.backbone, task, data, pixels)
        except TimeoutError as error:
            raise DeadlineError(f"No answer within {service.limits.timeout_s:g} s.") from error
    return Attention(generation=snapshot.generation, task=task.name, ref=task.ref, **found)


def _look(backbone: FrozenBackbone, task: Task, data: bytes, max_pixels: int) -> dict[str, Any]:
    image = read_image(BytesIO(data), "The image", FORMATS, max_pixels)
    weights = attention_map(backbone, task, backbone.transform(image).unsqueeze(0))[0]
    rows, columns = weights.shape
    box = seen_box(backbone.preprocessing, image.width, image.height)
    return {"rows": rows, "columns": columns, "weights": weights.flatten().tolist(), "box": box}


def seen_box(preprocessing: Mapping[str, Any], width: int, height: int) -> tuple[float, float, float, float]:
    """What of an image the backbone sees after timm's resizing and cropping, in shares of its width and height.

    Args:
        preprocessing: as `FrozenBackbone.preprocessing`.
        width: the image's, in pixels.
        height: the image's, in pixels.

    Returns:
        left, top, width, height; beyond 0 and 1 where the image is padded.
    """
    _, rows, columns = preprocessing["input_size"]
    tall, wide = (math.floor(size / preprocessing["crop_pct"]) for size in (rows, columns))
    if preprocessing["crop_mode"] != "squash":
        pick = min if preprocessing["crop_mode"] == "border" else max
        scale = pick(wide / width, tall / height)
        wide, tall = scale * width, scale * height
    across, down = columns / wide, rows / tall
    return (1 - across) / 2, (1 - down) / 2, across, down
