"""The Open Inference Protocol v2: what KServe's and Triton's clients speak."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np
import torch
from fastapi import APIRouter, Request, Response
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from addenda import __version__
from addenda.combined import predictions
from addenda.exceptions import DataError
from addenda.registry import OBJECTIVES, Task
from addenda.serving import tensors
from addenda.serving.access import Served, needs
from addenda.serving.bodies import read_images, while_connected
from addenda.serving.problems import ProblemError, documents
from addenda.serving.service import ServedPrediction, Service
from addenda.serving.snapshot import Snapshot
from addenda.serving.telemetry import check_ready

COMBINED = "combined"
"""The model of all tasks; a task of this name is answered as its outputs only."""

router = APIRouter(prefix="/v2", tags=["inference"], responses=documents(401, 403))


def _list_of(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """The schema of a list of objects."""
    return {"type": "array", "items": {"type": "object", "required": required, "properties": properties}}


_INPUT = {
    "name": {"enum": ["image", "pixel_values"]},
    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    "datatype": {"enum": ["BYTES", "FP32"]},
    "parameters": {"type": "object"},
    "data": {"type": "array"},
}
_BODY = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": _list_of(_INPUT, "name", "shape", "datatype"),
        "outputs": _list_of({"name": {"type": "string"}, "parameters": {"type": "object"}}, "name"),
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
async def index(service: Served) -> list[dict[str, str]]:
    """Every model that is served, and those that should be and cannot, each with the reason."""
    snapshot = service.snapshot
    served = {COMBINED: str(snapshot.generation)}
    served |= {name: str(record.version) for name, record in snapshot.records.items() if name != COMBINED}
    models = [{"name": name, "version": version, "state": "READY", "reason": ""} for name, version in served.items()]
    for ref, why in snapshot.quarantined.items():
        name, version = ref.rsplit(":", 1)
        models.append({"name": name, "version": version, "state": "UNAVAILABLE", "reason": why})
    return models


@router.get("/models/{model}", **_ASK, summary="A model")
async def metadata(service: Served, model: str) -> dict[str, Any]:
    """Its version, inputs and outputs."""
    return _metadata(service, model)


@router.get("/models/{model}/versions/{version}", **_ASK, summary="A version of a model")
async def version_metadata(service: Served, model: str, version: str) -> dict[str, Any]:
    """Its inputs and outputs, while it is served."""
    return _metadata(service, model, version)


@router.get("/models/{model}/ready", **_ASK, summary="Whether a model answers")
async def model_ready(request: Request, service: Served, model: str) -> dict[str, Any]:
    """404 with the reason where it does not."""
    check_ready(request)
    return {"name": model, "ready": bool(_model(service.snapshot, model))}


@router.get("/models/{model}/versions/{version}/ready", **_ASK, summary="Whether a version of a model answers")
async def version_ready(request: Request, service: Served, model: str, version: str) -> dict[str, Any]:
    """404 with the reason where it does not."""
    check_ready(request)
    return {"name": model, "ready": bool(_model(service.snapshot, model, version))}


@router.post("/models/{model}/infer", **_INFER)
async def infer(request: Request, service: Served, model: str) -> Response:
    """Answers encoded images (`image`) or pixels as the backbone takes them (`pixel_values`).

    `parameters.tasks` names the tasks of `combined`, `parameters.timeout` the most microseconds that it may take.
    """
    return await _infer(request, service, model)


@router.post("/models/{model}/versions/{version}/infer", **_INFER)
async def version_infer(request: Request, service: Served, model: str, version: str) -> Response:
    """As without a version; 404 where another one is served now."""
    return await _infer(request, service, model, version)


class _Output(NamedTuple):
    """An output of a model: its name, its task, and what it tells of it, "logits", "probs" or "label"."""

    name: str
    task: Task
    kind: str

    def metadata(self) -> dict[str, Any]:
        """What the protocol says of it."""
        if self.kind == "label":
            return {"name": self.name, "datatype": "BYTES", "shape": [-1]}
        return {"name": self.name, "datatype": "FP32", "shape": [-1, len(self.task.labels)]}

    def values(self, logits: Float[Tensor, "B C"]) -> NDArray[Any]:
        """What it tells, from its task's logits."""
        if self.kind == "label":
            return np.array([best[0][0] for best in predictions(self.task, logits, top=1)], dtype=object)
        found: NDArray[Any] = (logits if self.kind == "logits" else self.task.probabilities(logits)).numpy()
        return found


class _Model(NamedTuple):
    """Some tasks of a snapshot; `version` is the only one of this name that is served now."""

    name: str
    version: str
    tasks: Sequence[Task]

    def outputs(self) -> dict[str, _Output]:
        """All that it can tell, by name; a multi-label task has no one label."""
        found = {}
        for task in self.tasks:
            start = f"{task.name}." if self.name == COMBINED else ""
            for kind in ("logits", "probs", "label")[: 3 if OBJECTIVES[task.objective].exclusive else 2]:
                found[f"{start}{kind}"] = _Output(f"{start}{kind}", task, kind)
        return found

    def chosen(self, snapshot: Snapshot, asked: tensors.Request) -> list[_Output]:
        """The outputs that are asked for: all of some tasks, or those that are named."""
        names, model = asked.parameters.get("tasks"), self
        if names is not None:
            if self.name != COMBINED or not isinstance(names, str):
                raise DataError(
                    f"The parameter 'tasks' is for {COMBINED!r}: names of tasks as a string, with commas between."
                )
            wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
            for name in wanted:
                if name not in snapshot.model.tasks:
                    raise ProblemError(404, f"Task {short(name)} {snapshot.absence(name, (COMBINED,))}")
            model = self._replace(tasks=[snapshot.model.tasks[name] for name in wanted])
        available = model.outputs()
        for name in asked.outputs:
            if name not in available:
                known = ", ".join(map(repr, islice(available, 12))) or "none"
                raise DataError(f"Model {self.name!r} has no output {short(name)} for what is asked. Outputs: {known}.")
        return [available[name] for name in asked.outputs or available]


def _model(snapshot: Snapshot, name: str, version: str | None = None) -> _Model:
    """The model of a name, which must be served, in this version."""
    tasks = snapshot.model.tasks
    if name == COMBINED:
        found = _Model(name, str(snapshot.generation), list(tasks.values()))
    elif name in tasks:
        found = _Model(name, str(tasks[name].version), [tasks[name]])
    else:
        raise ProblemError(404, f"Model {name!r} {snapshot.absence(name, (COMBINED,))}")
    if version not in (None, found.version):
        raise ProblemError(
            404, f"Version {version!r} of model {name!r} is not served now; version {found.version!r} is."
        )
    return found


def _metadata(service: Service, name: str, version: str | None = None) -> dict[str, Any]:
    model = _model(service.snapshot, name, version)
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


async def _infer(request: Request, service: Service, name: str, version: str | None = None) -> Response:
    body, header_length = await read_images(request, service), request.headers.get(tensors.HEADER_LENGTH)

    async def answer() -> tuple[bytes, int | None]:
        asked = await asyncio.to_thread(tensors.parse, body, header_length)
        images, snapshot = _images(asked), service.snapshot
        model = _model(snapshot, name, version)
        outputs = model.chosen(snapshot, asked)
        answered = await service.answer(images, [output.task.name for output in outputs], _timeout_s(asked), snapshot)
        return await asyncio.to_thread(_encoded, model, asked, outputs, answered)

    content, json_length = await while_connected(request, answer())
    if json_length is None:
        return Response(content, media_type="application/json")
    headers = {tensors.HEADER_LENGTH: str(json_length)}
    return Response(content, headers=headers, media_type="application/octet-stream")


def _images(asked: tensors.Request) -> list[bytes] | Tensor:
    """The request's images, as files or as pixels."""
    if asked.tensors.keys() not in ({"image"}, {"pixel_values"}):
        raise DataError(f"A request has one input, 'image' or 'pixel_values'; this has {short(list(asked.tensors))}.")
    ((name, values),) = asked.tensors.items()
    datatype, rank, shape = ("BYTES", 1, "[B]") if name == "image" else ("FP32", 4, "[B, 3, H, W]")
    found = "FP32" if values.dtype == np.float32 else "BYTES"
    if (found, values.ndim) != (datatype, rank):
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
    model: _Model, asked: tensors.Request, outputs: Sequence[_Output], answered: ServedPrediction
) -> tuple[bytes, int | None]:
    head: dict[str, Any] = {"id": asked.id} if asked.id else {}
    head |= {
        "model_name": model.name,
        "model_version": model.version,
        "parameters": {"generation": answered.snapshot.generation, "exact": answered.logits.exact},
    }
    found = []
    for output in outputs:
        about = {"task": output.task.ref, "sha256": output.task.sha256}
        values, binary = output.values(answered.logits[output.task.name]), asked.outputs.get(output.name, asked.binary)
        found.append(tensors.Output(output.name, values, about, binary))
    return tensors.encode(head, found)
