"""The Open Inference Protocol over HTTP: what is told, what is answered, and what is refused."""

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
    """Of a server of two tasks: `digits`, and `tags` of many labels."""
    registered("digits")
    tags = multi_label(tiny, "tags")
    registry.register(tags, golden(tiny, tags))
    with client_of(tiny, registry) as made:
        yield made


def ask(client: AppClient, model: str = "combined", **members: Any) -> Any:
    """An answer in JSON, to one image unless other inputs are given."""
    image = base64.b64encode(pictures(1)[0]).decode()
    members = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [image]}], **members}
    return client.post(f"/v2/models/{model}/infer", json=members)


def test_a_model_tells_its_inputs_and_outputs(client: AppClient) -> None:
    found = client.get("/v2/models/combined").json()
    assert found["versions"] == [str(client.app.state.service.snapshot.generation)]
    assert {one["name"]: (one["datatype"], one["shape"]) for one in found["inputs"]} == {
        "image": ("BYTES", [-1]),
        "pixel_values": ("FP32", [-1, 3, 32, 32]),
    }
    assert {one["name"]: (one["datatype"], one["shape"]) for one in found["outputs"]} == {
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


def test_outputs_are_chosen_by_name_or_by_task(client: AppClient) -> None:
    def names(answer: Any) -> list[str]:
        return [output["name"] for output in answer.json()["outputs"]]

    everything = ["digits.logits", "digits.probs", "digits.label", "tags.logits", "tags.probs"]
    assert names(ask(client)) == everything
    assert names(ask(client, parameters={"tasks": "tags"})) == everything[3:]
    assert names(ask(client, parameters={"tasks": "tags, digits,tags"})) == everything[3:] + everything[:3]
    assert names(ask(client, outputs=[{"name": "tags.probs"}, {"name": "digits.label"}])) == [
        "tags.probs",
        "digits.label",
    ]
    assert names(ask(client, "digits")) == ["logits", "probs", "label"]


def test_an_answer_tells_where_it_comes_from(client: AppClient) -> None:
    snapshot = client.app.state.service.snapshot
    found = ask(client, id="mine").json()
    assert (found["id"], found["model_name"], found["model_version"]) == ("mine", "combined", str(snapshot.generation))
    assert found["parameters"] == {"generation": snapshot.generation, "exact": True}
    for output in found["outputs"]:
        record = snapshot.records[output["name"].split(".")[0]]
        assert output["parameters"] == {"task": record.ref, "sha256": record.sha256}
    assert "id" not in ask(client, "digits").json()
    assert ask(client, "digits").json()["model_version"] == "1"


def test_a_version_that_is_not_served_is_refused_with_the_one_that_is(client: AppClient) -> None:
    generation = client.app.state.service.snapshot.generation
    for model, now in (("combined", generation), ("digits", 1)):
        said = f"Version '99' of model '{model}' is not served now; version '{now}' is."
        for answer in (
            client.get(f"/v2/models/{model}/versions/99"),
            client.get(f"/v2/models/{model}/versions/99/ready"),
            ask(client, f"{model}/versions/99"),
        ):
            assert (answer.status_code, answer.json()["error"]) == (404, said)
        assert ask(client, f"{model}/versions/{now}").status_code == 200
        assert client.get(f"/v2/models/{model}/versions/{now}/ready").json() == {"name": model, "ready": True}


def test_a_quarantined_task_is_unavailable_with_its_reason(
    client: AppClient, tiny: FrozenBackbone, registry: Registry
) -> None:
    task = random_task(tiny, "false", seed=3)
    registry.register(task, golden(tiny, random_task(tiny, "other", seed=4)))
    assert client.app.state.service.follower.settle(registry.generation, 10)
    index = client.post("/v2/repository/index").json()
    assert [(one["name"], one["version"], one["state"]) for one in index] == [
        ("combined", str(registry.generation), "READY"),
        ("digits", "1", "READY"),
        ("tags", "1", "READY"),
        ("false", "1", "UNAVAILABLE"),
    ]
    why = index[-1]["reason"]
    assert why.startswith("Its golden probe")
    for answer in (client.get("/v2/models/false"), client.get("/v2/models/false/ready"), ask(client, "false")):
        assert (answer.status_code, answer.json()["error"]) == (404, f"Model 'false' is quarantined. {why}")
    answer = ask(client, parameters={"tasks": "digits,false"})
    assert (answer.status_code, answer.json()["error"]) == (404, f"Task 'false' is quarantined. {why}")


def test_a_server_that_stops_is_alive_and_not_ready(client: AppClient) -> None:
    places = ("health/ready", "models/combined/ready", "models/digits/versions/1/ready")
    assert [client.get(f"/v2/{place}").status_code for place in places] == [200] * 3
    client.app.state.draining = True
    assert [client.get(f"/v2/{place}").status_code for place in places] == [503] * 3
    assert client.get("/v2/health/live").json() == {"live": True}


def test_without_a_task_there_is_no_output(tiny: FrozenBackbone, registry: Registry) -> None:
    with client_of(tiny, registry) as client:
        assert ask(client).json()["outputs"] == []
        assert "Outputs: none." in ask(client, outputs=[{"name": "a.logits"}]).json()["error"]


def image(data: bytes) -> list[dict[str, Any]]:
    return [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(data).decode()]}]


def thin() -> bytes:
    file = BytesIO()
    Image.new("L", (1, 2_000_000)).save(file, "PNG")
    return file.getvalue()


REFUSED: list[tuple[int, str, dict[str, Any]]] = [
    (400, "one input, 'image' or 'pixel_values'; this has []", {"inputs": []}),
    (400, "'image' or 'pixel_values'; this has ['image', 'pixel_values']", {"inputs": image(b"") + pixels()}),
    (400, "Input 'image' is BYTES [B]; this is BYTES [1, 1]", {"inputs": [{**image(b"")[0], "shape": [1, 1]}]}),
    (400, "Input 'pixel_values' is FP32 [B, 3, H, W]; this is FP32 [3072]", {"inputs": pixels(shape=[3072])}),
    (400, "Input 'pixel_values' is FP32 [B, 3, H, W]; this is FP32 []", {"inputs": pixels(shape=[], data=[1])}),
    (400, "Images must have the shape [B, 3, 32, 32]", {"inputs": pixels(shape=[1, 3, 16, 64])}),
    (400, "A request is of 1 to 128 images, not 0", {"inputs": pixels(shape=[0, 3, 32, 32], data=[])}),
    (400, "1 to 128 images, not 129", {"inputs": [image(b"")[0] | {"shape": [129], "data": [""] * 129}]}),
    (400, "Input 'pixel_values' has values that are not finite", {"inputs": pixels(1e39)}),
    (400, "These pixel values give logits that are not finite", {"inputs": pixels(1e38)}),
    (400, "Image 0 cannot be read: it is not a JPEG, PNG, WEBP file", {"inputs": image(b"no image")}),
    (413, "1 x 2000000 pixels; one side may be at most 100 times as long as the other", {"inputs": image(thin())}),
    (400, "has no output 'logits' for what is asked. Outputs: 'digits.logits',", {"outputs": [{"name": "logits"}]}),
    (400, "has no output 'tags.probs'", {"outputs": [{"name": "tags.probs"}], "parameters": {"tasks": "digits"}}),
    (400, "has no output 'tags.label'", {"outputs": [{"name": "tags.label"}]}),
    (404, "Task 'cars' is not served. Served: 'combined', 'digits', 'tags'.", {"parameters": {"tasks": "cars"}}),
    (404, "Task '' is not served", {"parameters": {"tasks": ""}}),
    (400, "The parameter 'tasks' is for 'combined'", {"parameters": {"tasks": ["digits"]}}),
    (400, "The parameter 'tasks' is for 'combined'", {"model": "digits", "parameters": {"tasks": "digits"}}),
    (404, "Model 'cars' is not served. Served: 'combined', 'digits', 'tags'.", {"model": "cars"}),
    (400, "The parameter 'timeout' is -1; it is a number of microseconds", {"parameters": {"timeout": -1}}),
    (400, "The parameter 'timeout' is True", {"parameters": {"timeout": True}}),
    (504, "No answer within 1e-06 s", {"parameters": {"timeout": 1}}),
]  # fmt: skip


def test_what_cannot_be_answered_is_told_why(client: AppClient) -> None:
    for status, said, asked in REFUSED:
        answer = ask(client, **asked)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), said
        assert said in answer.json()["error"]
    assert ask(client).status_code == 200
