"""Helpers for tests of the Open Inference Protocol: images, tasks and clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferResult

from addenda import CombinedModel, FrozenBackbone, Registry, Task
from addenda.backbones import read_image
from addenda.combined import golden
from addenda.serving.tensors import HEADER_LENGTH
from tests.support.servers import ServedProcess
from tests.support.tasks import random_task

SIDE = 32


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """Encoded images of three formats and many sizes."""
    random = np.random.default_rng(seed)
    files = []
    for number in range(count):
        file = BytesIO()
        pixels = random.integers(0, 256, (*random.integers(20, 60, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, ("PNG", "JPEG", "WEBP")[number % 3])
        files.append(file.getvalue())
    return files


def images_of(files: Sequence[bytes]) -> InferInput:
    tensor = InferInput("image", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=object))
    return tensor


def infer(client: Any, files: Sequence[bytes], **parameters: object) -> InferResult:
    """Sends a request with any HTTP client; Triton's client encodes the body and decodes the response."""
    body, length = InferenceServerClient.generate_request_body([images_of(files)], parameters=parameters)
    response = client.post("/v2/models/combined/infer", content=body, headers={HEADER_LENGTH: str(length)})
    assert response.status_code == 200, response.text
    return InferResult.from_response_body(response.content, header_length=response.headers[HEADER_LENGTH])


def pixels_of(backbone: FrozenBackbone, files: Sequence[bytes]) -> torch.Tensor:
    return torch.stack([backbone.transform(read_image(BytesIO(file))) for file in files])


def alone(backbone: FrozenBackbone, task: Task, files: Sequence[bytes]) -> list[bytes]:
    """The bytes of a task's logits for each image, computed without other tasks, one image at a time."""
    model = CombinedModel(backbone, [task])
    return [model(image[None])[task.name].numpy().tobytes() for image in pixels_of(backbone, files)]


def multi_label(backbone: FrozenBackbone, name: str, seed: int = 0) -> Task:
    return replace(random_task(backbone, name, classes=5, seed=seed), objective="multi-label")


def client_at(served: ServedProcess) -> Any:
    import httpx2

    return httpx2.Client(base_url=served.url, timeout=60)


def served_tasks(glyphs: FrozenBackbone, path: Path) -> dict[str, Task]:
    """Creates a registry with tasks on `glyphs`; one extends another, one is multi-label."""
    with Registry.open(path) as registry:
        registry.add_backbone(glyphs.record())
        tasks: dict[str, Task] = {}
        for name in ("digits", "strokes", "tags"):
            parents = (tasks["digits"],) if name == "strokes" else ()
            task = multi_label(glyphs, name) if name == "tags" else random_task(glyphs, name, parents=parents, seed=1)
            tasks[name] = registry.register(task, golden(glyphs, task))
    return tasks


def pixels(values: object = 0.0, **members: Any) -> list[dict[str, Any]]:
    data = [values] * (3 * SIDE * SIDE)
    return [{"name": "pixel_values", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32", "data": data, **members}]
