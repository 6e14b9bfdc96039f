"""Where a task's token looked in an image, for the page to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from addenda.serving.access import Served, needs
from addenda.serving.bodies import BINARY, read_images, takes, while_connected
from addenda.serving.problems import documents

router = APIRouter(tags=["page"])


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


@router.post(
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
