"""The Open Inference Protocol v2: what KServe's and Triton's clients speak."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from fastapi import APIRouter, Request, Response
from torch import Tensor

from addenda import __version__
from addenda.exceptions import DataError
from addenda.serving import tensors
from addenda.serving.access import needs, service_of
from addenda.serving.bodies import read_body, while_connected
from addenda.serving.models import COMBINED, Model, Output, model_of
from addenda.serving.problems import documents
from addenda.serving.service import Answered, Service
from addenda.serving.telemetry import check_ready

router = APIRouter(prefix="/v2", tags=["inference"], responses=documents(401, 403))
_BODY: dict[str, Any] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {
                    "name": {"enum": ["image", "pixel_values"]},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "datatype": {"enum": ["BYTES", "FP32"]},
                    "parameters": {"type": "object"},
                    "data": {"type": "array"},
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
            },
        },
    },
}
_INFER: dict[str, Any] = {
    "dependencies": [needs("predict")],
    "summary": "Answers images",
    "response_class": Response,
    "responses": {
        200: {"description": "The outputs.", "content": {"application/json": {}, "application/octet-stream": {}}},
        **documents(400, 404, 408, 413, 415, 503, 504),
    },
    "openapi_extra": {
        "parameters": [{"name": tensors.HEADER_LENGTH, "in": "header", "schema": {"type": "integer", "minimum": 0}}],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _BODY}, "application/octet-stream": {}},
        },
    },
}
_ASK: dict[str, Any] = {"dependencies": [needs("predict")], "responses": documents(404, 503)}


@router.get("/health/live", summary="Whether the process runs")
async def live() -> dict[str, bool]:
    """Answers as long as the process does."""
    return {"live": True}


@router.get("/health/ready", summary="Whether requests should be sent here", responses=documents(503))
async def ready(request: Request) -> dict[str, bool]:
    """503 from the moment when the server is told to stop."""
    check_ready(request)
    return {"ready": True}


@router.get("", dependencies=[needs("predict")], summary="The server")
async def server() -> dict[str, Any]:
    """Its name and version, and the protocol's extensions that it knows."""
    return {"name": "addenda", "version": __version__, "extensions": ["binary_tensor_data", "model_repository"]}


@router.post("/repository/index", dependencies=[needs("predict")], summary="All models")
async def index(request: Request) -> list[dict[str, str]]:
    """Every model that is served, and those that should be and cannot, each with the reason."""
    snapshot = service_of(request).snapshot
    served = {COMBINED: str(snapshot.generation)}
    served |= {name: str(record.version) for name, record in snapshot.records.items() if name != COMBINED}
    models = [{"name": name, "version": version, "state": "READY", "reason": ""} for name, version in served.items()]
    for ref, why in snapshot.quarantined.items():
        name, version = ref.rsplit(":", 1)
        models.append({"name": name, "version": version, "state": "UNAVAILABLE", "reason": why})
    return models


@router.get("/models/{model}", **_ASK, summary="A model")
async def metadata(request: Request, model: str) -> dict[str, Any]:
    """Its version, inputs and outputs."""
    return _metadata(service_of(request), model)


@router.get("/models/{model}/versions/{version}", **_ASK, summary="A version of a model")
async def version_metadata(request: Request, model: str, version: str) -> dict[str, Any]:
    """Its inputs and outputs, while it is served."""
    return _metadata(service_of(request), model, version)


@router.get("/models/{model}/ready", **_ASK, summary="Whether a model answers")
async def model_ready(request: Request, model: str) -> dict[str, Any]:
    """404 with the reason where it does not."""
    check_ready(request)
    return {"name": model, "ready": bool(model_of(service_of(request).snapshot, model))}


@router.get("/models/{model}/versions/{version}/ready", **_ASK, summary="Whether a version of a model answers")
async def version_ready(request: Request, model: str, version: str) -> dict[str, Any]:
    """404 with the reason where it does not."""
    check_ready(request)
    return {"name": model, "ready": bool(model_of(service_of(request).snapshot, model, version))}


@router.post("/models/{model}/infer", **_INFER)
async def infer(request: Request, model: str) -> Response:
    """Answers encoded images (`image`) or pixels as the backbone takes them (`pixel_values`).

    `parameters.tasks` names the tasks of `combined`, `parameters.timeout` the most microseconds that it may take.
    """
    return await _infer(request, model)


@router.post("/models/{model}/versions/{version}/infer", **_INFER)
async def version_infer(request: Request, model: str, version: str) -> Response:
    """As without a version; 404 where another one is served now."""
    return await _infer(request, model, version)


def _metadata(service: Service, name: str, version: str | None = None) -> dict[str, Any]:
    model = model_of(service.snapshot, name, version)
    return {
        "name": name,
        "versions": [model.version],
        "platform": "addenda",
        "inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixel_values", "datatype": "FP32", "shape": [-1, *service.backbone.preprocessing["input_size"]]},
        ],
        "outputs": [output.metadata() for output in model.outputs().values()],
    }


async def _infer(request: Request, name: str, version: str | None = None) -> Response:
    service = service_of(request)
    service.check_room()
    body = await read_body(request, service.limits.body_bytes)
    answering = _answer(service, name, version, body, request.headers.get(tensors.HEADER_LENGTH))
    content, header_length = await while_connected(request, answering)
    if header_length is None:
        return Response(content, media_type="application/json")
    headers = {tensors.HEADER_LENGTH: str(header_length)}
    return Response(content, headers=headers, media_type="application/octet-stream")


async def _answer(
    service: Service, name: str, version: str | None, body: bytes, header_length: str | None
) -> tuple[bytes, int | None]:
    asked = await asyncio.to_thread(tensors.parse, body, header_length)
    images, snapshot = _images(asked), service.snapshot
    model = model_of(snapshot, name, version)
    outputs = model.chosen(snapshot, asked)
    answered = await service.answer(images, [output.task.name for output in outputs], _timeout_s(asked), snapshot)
    return await asyncio.to_thread(_encoded, model, asked, outputs, answered)


def _images(asked: tensors.Request) -> list[bytes] | Tensor:
    """The request's images, as files or as pixels."""
    if asked.tensors.keys() not in ({"image"}, {"pixel_values"}):
        raise DataError(f"A request has one input, 'image' or 'pixel_values'; this has {short(list(asked.tensors))}.")
    ((name, values),) = asked.tensors.items()
    datatype, rank = ("BYTES", 1) if name == "image" else ("FP32", 4)
    found = "FP32" if values.dtype == np.float32 else "BYTES"
    if (found, values.ndim) != (datatype, rank):
        shape = "[B]" if name == "image" else "[B, 3, H, W]"
        raise DataError(f"Input {name!r} is {datatype} {shape}; this is {found} {list(values.shape)}.")
    if name == "image":
        return list(values)
    if not np.isfinite(values).all():
        raise DataError("Input 'pixel_values' has values that are not finite.")
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _timeout_s(asked: tensors.Request) -> float | None:
    timeout = asked.parameters.get("timeout")
    if timeout is None:
        return None
    if type(timeout) is not int or not 0 < timeout < 2**63:
        raise DataError(f"The parameter 'timeout' is {short(timeout)}; it is a number of microseconds, from 1.")
    return timeout / 1e6


def _encoded(
    model: Model, asked: tensors.Request, outputs: Sequence[Output], answered: Answered
) -> tuple[bytes, int | None]:
    head: dict[str, Any] = {"id": asked.id} if asked.id else {}
    head |= {
        "model_name": model.name,
        "model_version": model.version,
        "parameters": {"generation": answered.snapshot.generation, "exact": answered.logits.exact},
    }
    found = [
        tensors.Output(
            output.name,
            output.values(answered.logits[output.task.name]),
            {"task": output.task.ref, "sha256": output.task.sha256},
            asked.outputs.get(output.name, asked.binary),
        )
        for output in outputs
    ]
    return tensors.encode(head, found)
