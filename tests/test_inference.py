"""The Open Inference Protocol over HTTP: Triton's own client, and the bits that it gets."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from addenda import CombinedModel, FrozenBackbone, Registry, Task
from addenda.backbones import read_image
from addenda.combined import golden
from addenda.serving.tensors import HEADER_LENGTH
from tests.commands import Run
from tests.conftest import random_task
from tests.servers import ServedProcess, client_of

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


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Iterator[TestClient]:
    """Of a server of two tasks: `digits`, and `tags` of many labels."""
    registered("digits")
    tags = multi_label(tiny, "tags")
    registry.register(tags, golden(tiny, tags))
    with client_of(tiny, registry) as made:
        yield made


def ask(client: TestClient, model: str = "combined", **members: Any) -> Any:
    """An answer in JSON, to one image unless other inputs are given."""
    image = base64.b64encode(pictures(1)[0]).decode()
    members = {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [image]}], **members}
    return client.post(f"/v2/models/{model}/infer", json=members)


def test_a_model_tells_its_inputs_and_outputs(client: TestClient) -> None:
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


def test_outputs_are_chosen_by_name_or_by_task(client: TestClient) -> None:
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


def test_an_answer_tells_where_it_comes_from(client: TestClient) -> None:
    snapshot = client.app.state.service.snapshot
    found = ask(client, id="mine").json()
    assert (found["id"], found["model_name"], found["model_version"]) == ("mine", "combined", str(snapshot.generation))
    assert found["parameters"] == {"generation": snapshot.generation, "exact": True}
    for output in found["outputs"]:
        record = snapshot.records[output["name"].split(".")[0]]
        assert output["parameters"] == {"task": record.ref, "sha256": record.sha256}
    assert "id" not in ask(client, "digits").json()
    assert ask(client, "digits").json()["model_version"] == "1"


def test_a_version_that_is_not_served_is_refused_with_the_one_that_is(client: TestClient) -> None:
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
    client: TestClient, tiny: FrozenBackbone, registry: Registry
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


def test_a_server_that_stops_is_alive_and_not_ready(client: TestClient) -> None:
    places = ("health/ready", "models/combined/ready", "models/digits/versions/1/ready")
    assert [client.get(f"/v2/{place}").status_code for place in places] == [200] * 3
    client.app.state.draining = True
    assert [client.get(f"/v2/{place}").status_code for place in places] == [503] * 3
    assert client.get("/v2/health/live").json() == {"live": True}


def test_without_a_task_there_is_no_output(tiny: FrozenBackbone, registry: Registry) -> None:
    with client_of(tiny, registry) as client:
        assert ask(client).json()["outputs"] == []
        assert "Outputs: none." in ask(client, outputs=[{"name": "a.logits"}]).json()["error"]


def pixels(values: object = 0.0, **members: Any) -> list[dict[str, Any]]:
    data = [values] * (3 * SIDE * SIDE)
    return [{"name": "pixel_values", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32", "data": data, **members}]


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
    (400, "A request is of 1 to 128 images, not 129", {"inputs": [image(b"")[0] | {"shape": [129], "data": [""] * 129}]}),
    (400, "Input 'pixel_values' has values that are not finite", {"inputs": pixels(1e39)}),
    (400, "These pixel values give logits that are not finite", {"inputs": pixels(1e38)}),
    (400, "Image 0 cannot be read: cannot identify image file", {"inputs": image(b"no image")}),
    (413, "Image 0 has 1 x 2000000 pixels; a side is at most 100 times the other", {"inputs": image(thin())}),
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


def test_what_cannot_be_answered_is_told_why(client: TestClient) -> None:
    for status, said, asked in REFUSED:
        answer = ask(client, **asked)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), said
        assert said in answer.json()["error"]
    assert ask(client).status_code == 200


@pytest.fixture(scope="module")
def tasks(glyphs: FrozenBackbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Task]]:
    """A registry of tasks on `glyphs`, one that extends another and one of many labels."""
    path = tmp_path_factory.mktemp("served") / "tasks.db"
    with Registry.open(path) as registry:
        registry.add_backbone(glyphs.record())
        made: dict[str, Task] = {}
        for name in ("digits", "strokes", "tags"):
            parents = (made["digits"],) if name == "strokes" else ()
            task = multi_label(glyphs, name) if name == "tags" else random_task(glyphs, name, parents=parents, seed=1)
            made[name] = registry.register(task, golden(glyphs, task))
    return path, made


@pytest.fixture(scope="module")
def served(tasks: tuple[Path, dict[str, Task]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    with ServedProcess(tasks[0], tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture
def triton(served: ServedProcess) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(served.url.removeprefix("http://")) as made:
        yield made


def test_tritons_client_learns_what_is_served(triton: InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("strokes", "1")
    assert not triton.is_model_ready("strokes", "2")
    assert triton.get_server_metadata()["name"] == "addenda"
    assert [one["name"] for one in triton.get_model_metadata("tags", "1")["outputs"]] == ["logits", "probs"]
    assert [one["name"] for one in triton.get_model_repository_index()] == ["combined", "digits", "strokes", "tags"]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_gets_the_models_own_bits(
    triton: InferenceServerClient,
    glyphs: FrozenBackbone,
    tasks: tuple[Path, dict[str, Task]],
    binary: bool,
    compression: str | None,
) -> None:
    files = pictures(5)
    pixels = pixels_of(glyphs, files)
    as_pixels = InferInput("pixel_values", list(pixels.shape), "FP32")
    as_pixels.set_data_from_numpy(pixels.numpy(), binary_data=binary)
    as_files = InferInput("image", [5], "BYTES")
    as_files.set_data_from_numpy(
        np.array(files if binary else [base64.b64encode(file) for file in files], dtype=object), binary_data=binary
    )
    logits = CombinedModel(glyphs, list(tasks[1].values()))(pixels)
    for given in (as_files, as_pixels):
        for name, task in tasks[1].items():
            kinds = ("logits", "probs") if name == "tags" else ("logits", "probs", "label")
            outputs = [InferRequestedOutput(f"{name}.{kind}", binary_data=binary) for kind in kinds]
            found = triton.infer("combined", [given], outputs=outputs, request_compression_algorithm=compression)
            assert found.as_numpy(f"{name}.logits").tobytes() == logits[name].numpy().tobytes()
            probabilities = task.probabilities(logits[name])
            assert found.as_numpy(f"{name}.probs").tobytes() == probabilities.numpy().tobytes()
            if name != "tags":
                labels = [task.labels[i] for i in probabilities.argmax(1)]
                texts = [text.decode() if binary else text for text in found.as_numpy(f"{name}.label")]
                assert texts == labels
            assert ("data" in found.get_output(f"{name}.logits")) is not binary
            alone = triton.infer(name, [given], request_compression_algorithm=compression)
            assert alone.as_numpy("logits").tobytes() == logits[name].numpy().tobytes()


def test_tritons_client_raises_with_our_message(triton: InferenceServerClient) -> None:
    given = [images_of(pictures(1))]
    asked: dict[str, Any] = {
        "Model 'cars' is not served. Served: 'combined', 'digits', 'strokes', 'tags'.": {"model_name": "cars"},
        "Version '7' of model 'digits' is not served now; version '1' is.": {
            "model_name": "digits",
            "model_version": "7",
        },
        "has no output 'probabilities'": {
            "model_name": "digits",
            "outputs": [InferRequestedOutput("probabilities")],
        },
        "Output 'logits' asks for classification, which is not offered": {
            "model_name": "digits",
            "outputs": [InferRequestedOutput("logits", class_count=2)],
        },
    }
    for said, arguments in asked.items():
        with pytest.raises(InferenceServerException) as error:
            triton.infer(inputs=given, **arguments)
        assert said in error.value.message()
    with pytest.raises(InferenceServerException, match="'cars' is not served"):
        triton.get_model_metadata("cars")


def test_served_probabilities_are_those_of_the_command_line(
    served: ServedProcess, tasks: tuple[Path, dict[str, Task]], tmp_path: Path, run: Run
) -> None:
    files = pictures(4, seed=5)
    for number, file in enumerate(files):
        (tmp_path / f"{number}.png").write_bytes(file)
    printed = run("predict", *sorted(tmp_path.glob("*.png")), "--registry", tasks[0], "--device", "cpu", "--json")
    told = list(json.loads(printed.out)["images"].values())
    with client_at(served) as client:
        for number, file in enumerate(files):
            (answer,) = infer(client, [file], tasks="digits").as_numpy("digits.probs").tolist()
            labels = dict(zip(tasks[1]["digits"].labels, answer, strict=True))
            assert {one["label"]: one["probability"] for one in told[number]["digits"]} == labels
            (answer,) = infer(client, [file], tasks="tags").as_numpy("tags.probs").tolist()
            likely = {label: p for label, p in zip(tasks[1]["tags"].labels, answer, strict=True) if p >= 0.5}
            assert {one["label"]: one["probability"] for one in told[number]["tags"]} == likely


def client_at(served: ServedProcess) -> Any:
    import httpx2

    return httpx2.Client(base_url=served.url, timeout=60)


def test_a_client_that_leaves_is_no_failure_of_the_server(served: ServedProcess) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    head = (
        "POST /v2/models/combined/infer HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {}\r\nContent-Length: {}\r\n\r\n"
    )
    body, length = InferenceServerClient.generate_request_body([images_of(pictures(128))])
    head = head.replace("X-Req", f"{HEADER_LENGTH}: {length}\r\nX-Req")
    for name, missing in (("early", 1), ("late", 0)):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.format(name, len(body) + missing).encode() + body)
    deadline = time.monotonic() + 20
    lines: list[Any] = []
    while len(lines) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        lines = [
            json.loads(line) for line in served.log.read_text().splitlines() if '"early"' in line or '"late"' in line
        ]
    assert sorted((line["request_id"], line["status"]) for line in lines) == [("early", 499), ("late", 499)]
    assert "Traceback" not in served.log.read_text()
    assert "traceback" not in served.log.read_text()
