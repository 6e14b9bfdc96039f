"""The Open Inference Protocol as tests speak it: images in, tasks to ask, and a client."""

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
    """Image files of three formats and many sizes."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        file = BytesIO()
        pixels = random.integers(0, 256, (*random.integers(20, 60, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, ("PNG", "JPEG", "WEBP")[number % 3])
        made.append(file.getvalue())
    return made


def images_of(files: Sequence[bytes]) -> InferInput:
    made = InferInput("image", [len(files)], "BYTES")
    made.set_data_from_numpy(np.array(files, dtype=object))
    return made


def infer(client: Any, files: Sequence[bytes], **parameters: object) -> InferResult:
    """Asks by any HTTP client; Triton's writes the body and reads the answer."""
    body, length = InferenceServerClient.generate_request_body([images_of(files)], parameters=parameters)
    answer = client.post("/v2/models/combined/infer", content=body, headers={HEADER_LENGTH: str(length)})
    assert answer.status_code == 200, answer.text
    return InferResult.from_response_body(answer.content, header_length=answer.headers[HEADER_LENGTH])


def pixels_of(backbone: FrozenBackbone, files: Sequence[bytes]) -> torch.Tensor:
    return torch.stack([backbone.transform(read_image(BytesIO(file))) for file in files])


def alone(backbone: FrozenBackbone, task: Task, files: Sequence[bytes]) -> list[bytes]:
    """The bytes of a task's logits for each image, computed without company."""
    model = CombinedModel(backbone, [task])
    return [model(image[None])[task.name].numpy().tobytes() for image in pixels_of(backbone, files)]


def multi_label(backbone: FrozenBackbone, name: str, seed: int = 0) -> Task:
    return replace(random_task(backbone, name, classes=5, seed=seed), objective="multi-label")


def client_at(served: ServedProcess) -> Any:
    import httpx2

    return httpx2.Client(base_url=served.url, timeout=60)


def served_tasks(glyphs: FrozenBackbone, path: Path) -> dict[str, Task]:
    """Makes a registry of tasks on `glyphs`, one that extends another and one of many labels."""
    with Registry.open(path) as registry:
        registry.add_backbone(glyphs.record())
        made: dict[str, Task] = {}
        for name in ("digits", "strokes", "tags"):
            parents = (made["digits"],) if name == "strokes" else ()
            task = multi_label(glyphs, name) if name == "tags" else random_task(glyphs, name, parents=parents, seed=1)
            made[name] = registry.register(task, golden(glyphs, task))
    return made


def pixels(values: object = 0.0, **members: Any) -> list[dict[str, Any]]:
    data = [values] * (3 * SIDE * SIDE)
    return [{"name": "pixel_values", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32", "data": data, **members}]
