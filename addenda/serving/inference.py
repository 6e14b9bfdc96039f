"""The Open Inference Protocol v2, for KServe and Triton clients."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
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
from addenda.combined import TASK_FEATURE, feature_widths, predictions
from addenda.exceptions import DataError
from addenda.registry import MEANINGS, Task
from addenda.serving import tensors
from addenda.serving.routes import ProblemError, Served, needs, problem_responses, read_images, while_connected
from addenda.serving.service import ServedPrediction, Service
from addenda.serving.snapshot import Snapshot
from addenda.serving.telemetry import check_ready, livez, readyz

COMBINED = "combined"
"""The model of all tasks; a task of this name has no model of its own, only outputs of this one."""
FEATURES = "features"
"""The model of the images' features; likewise."""

router = APIRouter(prefix="/v2", tags=["inference"], responses=problem_responses(401, 403))


def _array_schema(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """The OpenAPI schema of an array of objects."""
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
        "inputs": _array_schema(_INPUT, "name", "shape", "datatype"),
        "outputs": _array_schema({"name": {"type": "string"}, "parameters": {"type": "object"}}, "name"),
    },
}
_INFER: dict[str, Any] = {
    "dependencies": [needs("predict")],
    "summary": "Runs inference",
    "response_class": Response,
    "responses": {
        200: {"description": "Output tensors.", "content": {"application/json": {}, "application/octet-stream": {}}},
        **problem_responses(400, 404, 408, 413, 415, 503, 504),
    },
    "openapi_extra": {
        "parameters": [{"name": tensors.HEADER_LENGTH, "in": "header", "schema": {"type": "integer", "minimum": 0}}],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _BODY}, "application/octet-stream": {}},
        },
    },
}
_MODEL: dict[str, Any] = {"dependencies": [needs("predict")], "responses": problem_responses(404, 503)}


router.get("/health/live", name="live", summary="Liveness probe")(livez)
router.get("/health/ready", name="ready", summary="Readiness probe", responses=problem_responses(503))(readyz)


@router.get("", dependencies=[needs("predict")], summary="Server metadata")
async def server() -> dict[str, Any]:
    """Returns the server's name, version and supported protocol extensions."""
    return {"name": "addenda", "version": __version__, "extensions": ["binary_tensor_data", "model_repository"]}


@router.post("/repository/index", dependencies=[needs("predict")], summary="Model index")
async def index(service: Served) -> list[dict[str, str]]:
    """Lists the served models, and the quarantined ones with the reason."""
    snapshot = service.snapshot
    served = {name: str(record.version) for name, record in snapshot.records.items()}
    own = dict.fromkeys((COMBINED, FEATURES), str(snapshot.generation))
    served = own | served | own  # the first two, also if tasks have these names
    models = [{"name": name, "version": version, "state": "READY", "reason": ""} for name, version in served.items()]
    for ref, reason in snapshot.quarantined.items():
        name, version = ref.rsplit(":", 1)
        models.append({"name": name, "version": version, "state": "UNAVAILABLE", "reason": reason})
    return models


@router.get("/models/{model}", **_MODEL, summary="Model metadata")
async def metadata(service: Served, model: str) -> dict[str, Any]:
    """Returns the model's version, inputs and outputs."""
    return _metadata(service, model)


@router.get("/models/{model}/versions/{version}", **_MODEL, summary="Metadata of a model version")
async def version_metadata(service: Served, model: str, version: str) -> dict[str, Any]:
    """Returns the inputs and outputs of the served version; 404 for any other."""
    return _metadata(service, model, version)


@router.get("/models/{model}/ready", **_MODEL, summary="Model readiness")
async def model_ready(request: Request, service: Served, model: str) -> dict[str, Any]:
    """200 if it is served, else 404 with the reason."""
    check_ready(request)
    return {"name": model, "ready": bool(_model(service.snapshot, model))}


@router.get("/models/{model}/versions/{version}/ready", **_MODEL, summary="Readiness of a model version")
async def version_ready(request: Request, service: Served, model: str, version: str) -> dict[str, Any]:
    """200 if it is served, else 404 with the reason."""
    check_ready(request)
    return {"name": model, "ready": bool(_model(service.snapshot, model, version))}


@router.post("/models/{model}/infer", **_INFER)
async def infer(request: Request, service: Served, model: str) -> Response:
    """Runs inference on encoded images (`image`) or preprocessed pixels (`pixel_values`).

    `parameters.tasks` (comma-separated names or patterns) and `parameters.tag` select tasks of `combined` and of
    `features`; `parameters.timeout` is in microseconds.
    """
    return await _predict(request, service, model)


@router.post("/models/{model}/versions/{version}/infer", **_INFER)
async def version_infer(request: Request, service: Served, model: str, version: str) -> Response:
    """Runs inference if this version is served, else 404."""
    return await _predict(request, service, model, version)


class _Output(NamedTuple):
    """An output of a model; `kind` is "logits", "probs", "label" or "feature"."""

    name: str
    task: Task | None  # None for features of the backbone
    kind: str
    width: int

    def metadata(self) -> dict[str, Any]:
        """The output's metadata in the protocol."""
        if self.kind == "label":
            return {"name": self.name, "datatype": "BYTES", "shape": [-1]}
        return {"name": self.name, "datatype": "FP32", "shape": [-1, self.width]}

    @property
    def computed(self) -> str:
        """The name of what the service computes for it."""
        return self.name if self.kind == "feature" or self.task is None else self.task.name

    def values(self, computed: Float[Tensor, "B n"]) -> NDArray[Any]:
        """Converts its task's logits, or the feature."""
        if self.task is not None and self.kind == "label":
            return np.array([labels[0][0] for labels in predictions(self.task, computed, top=1)], dtype=object)
        if self.task is not None and self.kind == "probs":
            computed = self.task.probabilities(computed)
        values: NDArray[Any] = computed.numpy()
        return values


class _Model(NamedTuple):
    """A model of one or all tasks of a snapshot, or of features; only this `version` of it is served."""

    name: str
    version: str
    tasks: Sequence[Task]
    features: Mapping[str, int]  # the backbone's features and their widths, of the model of features

    def outputs(self) -> dict[str, _Output]:
        """All outputs by name; multi-label tasks have no `label`."""
        outputs = {name: _Output(name, None, "feature", width) for name, width in self.features.items()}
        if self.features:
            names = {task.name: f"{TASK_FEATURE}{task.name}" for task in self.tasks}
            width = self.features["pooled"]
            return outputs | {
                names[task.name]: _Output(names[task.name], task, "feature", width) for task in self.tasks
            }
        for task in self.tasks:
            prefix = f"{task.name}." if self.name == COMBINED else ""
            for kind in ("logits", "probs", "label")[: 3 if MEANINGS[task.objective].exclusive else 2]:
                outputs[f"{prefix}{kind}"] = _Output(f"{prefix}{kind}", task, kind, len(task.labels))
        return outputs

    def requested(self, snapshot: Snapshot, request: tensors.Request) -> list[_Output]:
        """The outputs that a request names, or else all outputs of its tasks."""
        names, tag, model = request.parameters.get("tasks"), request.parameters.get("tag"), self
        if names is not None or tag is not None:
            if self.name not in (COMBINED, FEATURES) or not all(isinstance(each, str | None) for each in (names, tag)):
                raise DataError(
                    f"The parameters 'tasks' and 'tag' are only for models {COMBINED!r} and {FEATURES!r}: "
                    "comma-separated names or patterns of tasks, and a tag, as strings."
                )
            selectors = None if names is None else [name.strip() for name in names.split(",")]
            model = self._replace(tasks=[snapshot.model.tasks[name] for name in snapshot.select(selectors, tag)])
        available = model.outputs()
        for name in request.outputs:
            if name not in available:
                known = ", ".join(map(repr, islice(available, 12))) or "none"
                raise DataError(f"Model {self.name!r} has no output {short(name)} for this request. Outputs: {known}.")
        return [available[name] for name in request.outputs or available]


def _model(snapshot: Snapshot, name: str, version: str | None = None) -> _Model:
    """The served model of a name; raises ProblemError (404) if it, or this version, is not served."""
    tasks = snapshot.model.tasks
    if name in (COMBINED, FEATURES):
        features = feature_widths(snapshot.model.backbone) if name == FEATURES else {}
        model = _Model(name, str(snapshot.generation), list(tasks.values()), features)
    elif name in tasks:
        model = _Model(name, str(tasks[name].version), [tasks[name]], {})
    else:
        raise ProblemError(404, f"Model {name!r} {snapshot.absence(name, (COMBINED, FEATURES))}")
    if version not in (None, model.version):
        raise ProblemError(
            404, f"Version {version!r} of model {name!r} is not served. Served: version {model.version!r}."
        )
    return model


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


async def _predict(request: Request, service: Service, name: str, version: str | None = None) -> Response:
    body, header_length = await read_images(request, service), request.headers.get(tensors.HEADER_LENGTH)

    async def predict() -> tuple[bytes, int | None, dict[str, str]]:
        parsed = await asyncio.to_thread(tensors.parse, body, header_length)
        images, snapshot = _images(parsed), service.snapshot
        model = _model(snapshot, name, version)
        outputs = model.requested(snapshot, parsed)
        compute = service.embed if name == FEATURES else service.predict
        names = [output.computed for output in outputs]
        prediction = await compute(images, names, _timeout_s(parsed), snapshot)
        encoded = await asyncio.to_thread(_encode, model, parsed, outputs, prediction)
        return *encoded, prediction.logits.headers

    content, json_length, headers = await while_connected(request, predict())
    if json_length is None:
        return Response(content, headers=headers, media_type="application/json")
    headers[tensors.HEADER_LENGTH] = str(json_length)
    return Response(content, headers=headers, media_type="application/octet-stream")


def _images(request: tensors.Request) -> list[bytes] | Tensor:
    """The request's images, as files or as preprocessed pixels."""
    if request.tensors.keys() not in ({"image"}, {"pixel_values"}):
        names = short(list(request.tensors))
        raise DataError(f"A request must have one input, 'image' or 'pixel_values'; this one has {names}.")
    ((name, values),) = request.tensors.items()
    datatype, rank, shape = ("BYTES", 1, "[B]") if name == "image" else ("FP32", 4, "[B, 3, H, W]")
    actual = "FP32" if values.dtype == np.float32 else "BYTES"
    if (actual, values.ndim) != (datatype, rank):
        raise DataError(f"Input {name!r} must be {datatype} {shape}, not {actual} {list(values.shape)}.")
    if name == "image":
        return list(values)
    if not np.isfinite(values).all():
        raise DataError("Input 'pixel_values' has values that are not finite.")
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _timeout_s(request: tensors.Request) -> float | None:
    timeout = request.parameters.get("timeout")
    if timeout is None:
        return None
    if type(timeout) is not int or not 0 < timeout < 2**63:
        raise DataError(f"Parameter 'timeout' is {short(timeout)}; it must be a number of microseconds, at least 1.")
    return timeout / 1e6


def _encode(
    model: _Model, request: tensors.Request, outputs: Sequence[_Output], prediction: ServedPrediction
) -> tuple[bytes, int | None]:
    response: dict[str, Any] = {"id": request.id} if request.id else {}
    response |= {
        "model_name": model.name,
        "model_version": model.version,
        "parameters": {"generation": prediction.snapshot.generation, "exact": prediction.logits.exact},
    }
    encoded = []
    for output in outputs:
        parameters = {} if output.task is None else {"task": output.task.ref, "sha256": output.task.sha256}
        values = output.values(prediction.logits[output.computed])
        binary = request.outputs.get(output.name, request.binary)
        encoded.append(tensors.Output(output.name, values, parameters, binary))
    return tensors.encode(response, encoded)
