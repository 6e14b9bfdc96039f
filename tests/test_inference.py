"""The Open Inference Protocol over HTTP: Triton's own client, and the bits that it gets."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from addenda import CombinedModel, FrozenBackbone, Registry, Task
from addenda.backbones import load_backbone, read_image
from addenda.combined import golden
from addenda.serving.tensors import HEADER_LENGTH
from tests.commands import Run
from tests.conftest import random_task
from tests.processes import exit_code
from tests.servers import ServedProcess, client_of

SIDE = 32
MALFORMED = 10_000
MOST_MORE_BYTES = 2**30
"""What a server may take beyond what it has after its first answer: an image of 49 million pixels, decoded, and copies
of it; and a body of 32 MiB as Python objects."""


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
    (400, "1 to 128 images, not 129", {"inputs": [image(b"")[0] | {"shape": [129], "data": [""] * 129}]}),
    (400, "Input 'pixel_values' has values that are not finite", {"inputs": pixels(1e39)}),
    (400, "These pixel values give logits that are not finite", {"inputs": pixels(1e38)}),
    (400, "Image 0 cannot be read: it is no JPEG, PNG, WEBP file", {"inputs": image(b"no image")}),
    (413, "1 x 2000000 pixels; a side may be 100 times as long as the other", {"inputs": image(thin())}),
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


def _register_more(location: str) -> None:
    """New tasks, and new versions of tasks, one after another."""
    backbone = load_backbone("glyphs", device="cpu")
    with Registry.open(location, create=False) as registry:
        for seed, name in enumerate(["digits", "letters", "tags", "letters", "digits"], start=50):
            task = random_task(backbone, name, classes=5, seed=seed)
            registry.register(task, golden(backbone, task), new_version=True)
            time.sleep(0.5)


@pytest.mark.slow
def test_answers_under_load_are_each_of_one_generation_and_have_the_bits_they_have_alone(
    glyphs: FrozenBackbone, tasks: tuple[Path, dict[str, Task]], tmp_path: Path, another_interpreter: None
) -> None:
    files, path, over = pictures(20, seed=9), tmp_path / "tasks.db", threading.Event()
    with Registry.open(tasks[0]) as registry:
        registry.backup(path)

    def work(seed: int) -> list[tuple[list[int], set[str], InferResult]]:
        random, answers = Random(seed), []
        with client_at(served) as client:
            while len(answers) < 10 or not over.is_set():
                chosen = random.choices(range(len(files)), k=random.choice([1, 1, 2, 5, 9, 33]))
                names = random.choice([(), ("digits",), ("tags", "strokes"), ("strokes", "digits", "tags")])
                asked = {"tasks": ",".join(names)} if names else {}
                answers.append((chosen, set(names), infer(client, [files[i] for i in chosen], **asked)))
        return answers

    with ServedProcess(path, tmp_path, "--max-waiting", 1000) as served, ThreadPoolExecutor(16) as pool:
        working = [pool.submit(work, seed) for seed in range(16)]
        try:
            assert exit_code(_register_more, str(path), timeout_s=120) == 0
        finally:
            over.set()
        answers = [answer for one in working for answer in one.result()]

    with Registry.open(path) as registry:
        records = [registry.record(event.subject) for event in registry.events() if event.kind == "registered"]
        expected = {record.sha256: alone(glyphs, registry.get(record.ref), files) for record in records}
    generations = set()
    for chosen, names, answer in answers:
        told = answer.get_response()
        generation = told["parameters"]["generation"]
        assert told["model_version"] == str(generation)
        current = {record.name: record for record in records if record.generation <= generation}
        described = {(one["parameters"]["task"], one["parameters"]["sha256"]) for one in told["outputs"]}
        assert described == {(r.ref, r.sha256) for r in current.values() if not names or r.name in names}
        for ref, sha256 in described:
            logits = answer.as_numpy(f"{ref.split(':')[0]}.logits")
            assert [row.tobytes() for row in logits] == [expected[sha256][i] for i in chosen]
        generations.add(generation)
    assert len(answers) >= 160
    assert len(generations) >= 4, "too few registrations fell into the load to prove anything"


def image_files() -> list[bytes]:
    """Valid files of every kind that is taken: colour models, transparency, animation, metadata."""
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 28, 3), dtype=np.uint8))
    exif, text = Image.Exif(), PngInfo()
    exif[0x0112], exif[0x010E] = 6, "hello"
    text.add_text("a", "b" * 100, zip=True)
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("JPEG", colour, {"exif": exif}),
        ("JPEG", colour, {"progressive": True}),
        ("JPEG", colour.convert("CMYK"), {}),
        ("PNG", colour, {"exif": exif, "pnginfo": text, "icc_profile": b"x" * 200}),
        ("PNG", colour.convert("RGBA"), {}),
        ("PNG", colour.convert("P"), {"transparency": 3}),
        ("PNG", colour.convert("1"), {}),
        ("PNG", Image.fromarray(np.arange(672, dtype=np.uint16).reshape(24, 28)), {}),
        ("PNG", colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
        ("WEBP", colour, {"exif": exif}),
        ("WEBP", colour.convert("RGBA"), {"lossless": True}),
        ("WEBP", colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
    ]
    made = []
    for kind, picture, options in kinds:
        file = BytesIO()
        picture.save(file, kind, **options)
        made.append(file.getvalue())
    return made


def with_right_checksums(png: bytes) -> bytes:
    """A PNG file whose chunks' checksums fit again, so that a reader looks at what is in them."""
    made, at = bytearray(png[:8]), 8
    while at + 12 <= len(png):
        chunk = png[at + 4 : at + 8 + int.from_bytes(png[at : at + 4], "big")]
        made += png[at : at + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        at += 8 + len(chunk) + 4 if chunk else len(png)
    return bytes(made)


def mutated(random: Random, data: bytes) -> bytes:
    """Bytes cut off, flipped, overwritten with extremes, taken out or put in."""
    changed, at = bytearray(data), random.randrange(len(data))
    how = random.choice(("cut", "flip", "flip", "flip", "extreme", "remove", "insert"))
    if how == "cut":
        del changed[at:]
    elif how == "flip":
        for _ in range(random.choice((1, 1, 2, 4, 16))):
            changed[random.randrange(min(len(data), random.choice((40, 200, len(data)))))] ^= 1 << random.randrange(8)
    elif how == "extreme":
        changed[at : at + 4] = random.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"99e9", b"[[[["))
    elif how == "remove":
        del changed[at : at + random.randrange(1, 64)]
    else:
        changed[at:at] = random.randbytes(random.randrange(1, 64))
    return bytes(changed)


def png_of(width: int, height: int) -> bytes:
    """A PNG file whose head says a size, and whose pixels are zeros of as many bytes as fit into a small file."""
    rows = zlib.compress(bytes(min(height * (1 + 3 * width), 2**28)), 9)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


Asked = tuple[bytes, dict[str, str]]


def asked_in_binary(files: Sequence[bytes]) -> Asked:
    body, length = InferenceServerClient.generate_request_body([images_of(files)])
    return body, {HEADER_LENGTH: str(length)}


def asked_in_json(**members: Any) -> Asked:
    return json.dumps(members).encode(), {}


def bombs() -> list[Asked]:
    """Small requests that would be large where they are believed."""
    one = {"name": "pixel_values", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32", "data": [0.0]}
    lists: list[Any] = [[0.0]]
    for _ in range(150):
        lists = [lists]
    made = [
        asked_in_binary([png_of(*size)]) for size in ((100_000, 100_000), (7000, 7000), (1, 40_000_000), (2**31 - 1, 1))
    ]
    made += [
        asked_in_json(inputs=[{**one, "shape": shape}]) for shape in ([2**31] * 8, [10**300], [1] * 10_000, [2**31, 0])
    ]
    made += [
        asked_in_json(inputs=[{**one, "data": lists}]),
        asked_in_json(inputs=[{**one, "data": ["x" * 10**6, *[0.0] * 3071]}]),
        asked_in_json(inputs=[{**one, "data": [10**300] * 3072}]),
        asked_in_json(inputs=[one] * 10_000),
        asked_in_json(inputs=[{"name": str(i)} for i in range(10_000)]),
        asked_in_json(inputs=[one], outputs=[{"name": str(i)} for i in range(10_000)]),
        (b"[" * 10**6, {}),
        (b'{"inputs":[' + b"{}," * 10**6, {}),
        (b'{"inputs":[' + b"1," * 5 * 10**6, {}),
        (b'{"inputs":[' + b"9" * 10**6, {}),
        (b"\x01\x00\x00\x00" * 10**6, {HEADER_LENGTH: "999999999999999999999"}),
        (gzip.compress(bytes(10**8), 9), {"Content-Encoding": "gzip"}),
        (gzip.compress(b"[" * (31 * 2**20), 9), {"Content-Encoding": "gzip"}),
        (zlib.compress(bytes(10**8), 9), {"Content-Encoding": "deflate"}),
        (b"not deflated", {"Content-Encoding": "deflate"}),
        (b"{}", {"Content-Encoding": "br"}),
    ]  # fmt: skip
    return made


def malformed(random: Random, count: int) -> Iterator[Asked]:
    """Requests that are valid but for what was done to a file, the body or a header; every bomb in between."""
    files = image_files()
    encoded = [base64.b64encode(file).decode() for file in files]
    bodies = [
        asked_in_binary(files[:2]),
        asked_in_json(
            id="x",
            inputs=[{"name": "image", "shape": [2], "datatype": "BYTES", "data": encoded[:2]}],
            outputs=[{"name": "digits.logits", "parameters": {"binary_data": True}}],
            parameters={"timeout": 10**7, "tasks": "digits"},
        ),
        asked_in_json(inputs=pixels(0.5)),
    ]
    threats = bombs()
    every = count // len(threats)
    for number in range(count):
        if number % every == 0 and threats:
            yield threats.pop()
        elif random.random() < 0.6:
            file = mutated(random, random.choice(files))
            is_png = file.startswith(b"\x89PNG") and random.random() < 0.8
            yield asked_in_binary([with_right_checksums(file) if is_png else file])
        else:
            body, headers = random.choice(bodies)
            length = headers.get(HEADER_LENGTH)
            if length is not None and random.random() < 0.3:
                yield body, {HEADER_LENGTH: str(int(length) + random.choice((-1, 1, 10**6, -int(length), 7)))}
            elif length is not None and random.random() < 0.7:
                head = mutated(random, body[: int(length)])
                yield head + body[int(length) :], {HEADER_LENGTH: str(len(head))}
            else:
                yield mutated(random, body), headers


def resident_bytes(pid: int) -> int:
    """The most that a process has had in memory so far."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_ten_thousand_malformed_requests_neither_break_nor_fill_the_server(
    tasks: tuple[Path, dict[str, Task]], tmp_path: Path
) -> None:
    statuses: Counter[int] = Counter()
    with ServedProcess(tasks[0], tmp_path) as served, client_at(served) as client:
        good = pictures(3)
        first = infer(client, good)
        before = resident_bytes(served.process.pid)
        waiting, taking = malformed(Random(7), MALFORMED), threading.Lock()

        def send() -> Counter[int]:
            found: Counter[int] = Counter()
            connection = HTTPConnection(served.url.removeprefix("http://"))  # far quicker than a friendlier client
            while True:
                with taking:
                    asked = next(waiting, None)
                if asked is None:
                    connection.close()
                    return found
                connection.request("POST", "/v2/models/combined/infer", *asked)
                answer = connection.getresponse()
                told = answer.read()
                found[answer.status] += 1
                assert answer.status < 500, told
                assert answer.status == 200 or json.loads(told)["detail"]

        with ThreadPoolExecutor(8) as senders:  # so many pass the model together
            for sent in [senders.submit(send) for _ in range(8)]:
                statuses += sent.result()
        assert served.process.poll() is None
        assert resident_bytes(served.process.pid) - before < MOST_MORE_BYTES
        again = infer(client, good)
        for output in first.get_response()["outputs"]:
            one, other = (answer.as_numpy(output["name"]) for answer in (first, again))
            assert one.tobytes() == other.tobytes() if one.dtype == np.float32 else one.tolist() == other.tolist()
    assert statuses.total() == MALFORMED
    assert {200, 400, 413, 415} <= statuses.keys() <= {200, 400, 404, 413, 415}
    assert statuses[400] > MALFORMED / 2
    assert "traceback" not in served.log.read_text()
