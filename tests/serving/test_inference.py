"""The Open Inference Protocol over HTTP: metadata, inference and errors."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from addenda import FrozenBackbone, Registry, Task
from addenda.combined import golden
from tests.support.inference import multi_label, pictures, pixels
from tests.support.servers import AppClient, client_of
from tests.support.tasks import random_task


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Iterator[AppClient]:
    """A client of a server with two tasks: `digits`, and the multi-label `tags`."""
    registered("digits")
    tags = multi_label(tiny, "tags")
    registry.register(tags, golden(tiny, tags))
    with client_of(tiny, registry) as opened:
        yield opened


def infer(client: AppClient, model: str = "combined", **members: Any) -> Any:
    """Sends a JSON inference request, with one image unless other inputs are given."""
    image = base64.b64encode(pictures(1)[0]).decode()
    members = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [image]}], **members}
    return client.post(f"/v2/models/{model}/infer", json=members)


def test_model_metadata_has_versions_inputs_and_outputs(client: AppClient) -> None:
    metadata = client.get("/v2/models/combined").json()
    assert metadata["versions"] == [str(client.app.state.service.snapshot.generation)]
    assert {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in metadata["inputs"]} == {
        "image": ("BYTES", [-1]),
        "pixel_values": ("FP32", [-1, 3, 32, 32]),
    }
    assert {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in metadata["outputs"]} == {
        "digits.logits": ("FP32", [-1, 3]),
        "digits.probs": ("FP32", [-1, 3]),
        "digits.label": ("BYTES", [-1]),
        "tags.logits": ("FP32", [-1, 5]),
        "tags.probs": ("FP32", [-1, 5]),
    }
    assert client.get("/v2/models/tags/versions/1").json()["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 5]},
        {"name": "probs", "datatype": "FP32", "shape": [-1, 5]},
    ]


def test_outputs_are_selected_by_name_or_by_task(client: AppClient) -> None:
    def names(response: Any) -> list[str]:
        return [output["name"] for output in response.json()["outputs"]]

    everything = ["digits.logits", "digits.probs", "digits.label", "tags.logits", "tags.probs"]
    assert names(infer(client)) == everything
    assert names(infer(client, parameters={"tasks": "tags"})) == everything[3:]
    assert names(infer(client, parameters={"tasks": "ta*"})) == everything[3:]
    assert names(infer(client, parameters={"tasks": "tags, digits,tags"})) == everything[3:] + everything[:3]
    assert names(infer(client, outputs=[{"name": "tags.probs"}, {"name": "digits.label"}])) == [
        "tags.probs",
        "digits.label",
    ]
    assert names(infer(client, "digits")) == ["logits", "probs", "label"]


def test_a_response_identifies_its_generation_and_tasks(client: AppClient) -> None:
    snapshot = client.app.state.service.snapshot
    response = infer(client, id="mine").json()
    assert (response["id"], response["model_name"], response["model_version"]) == (
        "mine",
        "combined",
        str(snapshot.generation),
    )
    assert response["parameters"] == {"generation": snapshot.generation, "exact": True}
    for output in response["outputs"]:
        record = snapshot.records[output["name"].split(".")[0]]
        assert output["parameters"] == {"task": record.ref, "sha256": record.sha256}
    assert "id" not in infer(client, "digits").json()
    assert infer(client, "digits").json()["model_version"] == "1"


def test_an_error_for_another_version_names_the_served_one(client: AppClient) -> None:
    generation = client.app.state.service.snapshot.generation
    for model, served in (("combined", generation), ("digits", 1)):
        error = f"Version '99' of model '{model}' is not served. Served: version '{served}'."
        for response in (
            client.get(f"/v2/models/{model}/versions/99"),
            client.get(f"/v2/models/{model}/versions/99/ready"),
            infer(client, f"{model}/versions/99"),
        ):
            assert (response.status_code, response.json()["error"]) == (404, error)
        assert infer(client, f"{model}/versions/{served}").status_code == 200
        assert client.get(f"/v2/models/{model}/versions/{served}/ready").json() == {"name": model, "ready": True}


def test_a_quarantined_task_is_unavailable_with_its_reason(
    client: AppClient, tiny: FrozenBackbone, registry: Registry
) -> None:
    task = random_task(tiny, "false", seed=3)
    registry.register(task, golden(tiny, random_task(tiny, "other", seed=4)))
    assert client.app.state.service.follower.settle(registry.generation, 10)
    index = client.post("/v2/repository/index").json()
    assert [(model["name"], model["version"], model["state"]) for model in index] == [
        ("combined", str(registry.generation), "READY"),
        ("features", str(registry.generation), "READY"),
        ("digits", "1", "READY"),
        ("tags", "1", "READY"),
        ("false", "1", "UNAVAILABLE"),
    ]
    reason = index[-1]["reason"]
    assert reason.startswith("Its golden probe")
    for response in (client.get("/v2/models/false"), client.get("/v2/models/false/ready"), infer(client, "false")):
        assert (response.status_code, response.json()["error"]) == (404, f"Model 'false' is quarantined. {reason}")
    response = infer(client, parameters={"tasks": "digits,false"})
    assert (response.status_code, response.json()["error"]) == (404, f"Task 'false' is quarantined. {reason}")


def test_a_draining_server_is_live_and_not_ready(client: AppClient) -> None:
    paths = ("health/ready", "models/combined/ready", "models/digits/versions/1/ready")
    assert [client.get(f"/v2/{path}").status_code for path in paths] == [200] * 3
    client.app.state.draining = True
    assert [client.get(f"/v2/{path}").status_code for path in paths] == [503] * 3
    assert client.get("/v2/health/live").json() == {"live": True}


def test_without_a_task_there_is_no_output(tiny: FrozenBackbone, registry: Registry) -> None:
    with client_of(tiny, registry) as client:
        assert infer(client).json()["outputs"] == []
        assert "Outputs: none." in infer(client, outputs=[{"name": "a.logits"}]).json()["error"]


def image(data: bytes) -> list[dict[str, Any]]:
    return [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(data).decode()]}]


def thin() -> bytes:
    file = BytesIO()
    Image.new("L", (1, 2_000_000)).save(file, "PNG")
    return file.getvalue()


INVALID: list[tuple[int, str, dict[str, Any]]] = [
    (400, "one input, 'image' or 'pixel_values'; this one has []", {"inputs": []}),
    (400, "'image' or 'pixel_values'; this one has ['image', 'pixel_values']", {"inputs": image(b"") + pixels()}),
    (400, "Input 'image' must be BYTES [B], not BYTES [1, 1]", {"inputs": [{**image(b"")[0], "shape": [1, 1]}]}),
    (400, "Input 'pixel_values' must be FP32 [B, 3, H, W], not FP32 [3072]", {"inputs": pixels(shape=[3072])}),
    (400, "Input 'pixel_values' must be FP32 [B, 3, H, W], not FP32 []", {"inputs": pixels(shape=[], data=[1])}),
    (400, "Images must have the shape [B, 3, 32, 32]", {"inputs": pixels(shape=[1, 3, 16, 64])}),
    (400, "A request may have 1 to 128 images; this one has 0", {"inputs": pixels(shape=[0, 3, 32, 32], data=[])}),
    (400, "1 to 128 images; this one has 129", {"inputs": [image(b"")[0] | {"shape": [129], "data": [""] * 129}]}),
    (400, "Input 'pixel_values' has values that are not finite", {"inputs": pixels(1e39)}),
    (400, "These pixel values give logits that are not finite", {"inputs": pixels(1e38)}),
    (400, "Image 0 cannot be read: it is not a JPEG, PNG or WEBP file", {"inputs": image(b"no image")}),
    (413, "1 x 2000000 pixels; the maximum aspect ratio is 100:1. Crop it.", {"inputs": image(thin())}),
    (400, "has no output 'logits' for this request. Outputs: 'digits.logits',", {"outputs": [{"name": "logits"}]}),
    (400, "has no output 'tags.probs'", {"outputs": [{"name": "tags.probs"}], "parameters": {"tasks": "digits"}}),
    (400, "has no output 'tags.label'", {"outputs": [{"name": "tags.label"}]}),
    (404, "Task 'cars' is not served. Served: 'digits', 'tags'.", {"parameters": {"tasks": "cars"}}),
    (404, "Task '' is not served", {"parameters": {"tasks": ""}}),
    (404, "No available task matches 'car*'", {"parameters": {"tasks": "car*"}}),
    (404, "No selected task has the tag 'beta'", {"parameters": {"tag": "beta"}}),
    (400, "parameters 'tasks' and 'tag' are only for models", {"parameters": {"tag": 1}}),
    (400, "parameters 'tasks' and 'tag' are only for models", {"parameters": {"tasks": ["digits"]}}),
    (400, "parameters 'tasks' and 'tag' are only for models", {"model": "digits", "parameters": {"tasks": "digits"}}),
    (404, "Model 'cars' is not served. Served: 'combined', 'features', 'digits', 'tags'.", {"model": "cars"}),
    (400, "Parameter 'timeout' is -1; it must be a number of microseconds", {"parameters": {"timeout": -1}}),
    (400, "Parameter 'timeout' is True", {"parameters": {"timeout": True}}),
    (504, "The request timed out after 1e-06 s", {"parameters": {"timeout": 1}}),
]  # fmt: skip


def test_an_invalid_request_gets_an_error_with_the_reason(client: AppClient) -> None:
    for status, error, request in INVALID:
        response = infer(client, **request)
        assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json"), error
        assert error in response.json()["error"]
    assert infer(client).status_code == 200
