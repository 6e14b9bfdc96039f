"""Triton's client against a running server: bitwise equal results, alone and under load."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

from addenda import CombinedModel, FrozenBackbone, Registry, Task
from addenda.backbones import load_backbone
from addenda.combined import golden
from addenda.serving.tensors import HEADER_LENGTH
from tests.support.commands import Run
from tests.support.inference import alone, client_at, images_of, infer, pictures, pixels_of, served_tasks
from tests.support.moments import until
from tests.support.processes import exit_code
from tests.support.servers import ServedProcess
from tests.support.tasks import random_task

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tasks(glyphs: FrozenBackbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Task]]:
    path = tmp_path_factory.mktemp("served") / "tasks.db"
    return path, served_tasks(glyphs, path)


@pytest.fixture(scope="module")
def served(tasks: tuple[Path, dict[str, Task]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    with ServedProcess(tasks[0], tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture
def triton(served: ServedProcess) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(served.url.removeprefix("http://")) as client:
        yield client


def test_tritons_client_reads_the_metadata(triton: InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("strokes", "1")
    assert not triton.is_model_ready("strokes", "2")
    assert triton.get_server_metadata()["name"] == "addenda"
    assert [output["name"] for output in triton.get_model_metadata("tags", "1")["outputs"]] == ["logits", "probs"]
    assert [model["name"] for model in triton.get_model_repository_index()] == [
        "combined",
        "features",
        "digits",
        "strokes",
        "tags",
    ]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_gets_the_bits_of_the_model(
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
    for images in (as_files, as_pixels):
        for name, task in tasks[1].items():
            kinds = ("logits", "probs") if name == "tags" else ("logits", "probs", "label")
            outputs = [InferRequestedOutput(f"{name}.{kind}", binary_data=binary) for kind in kinds]
            result = triton.infer("combined", [images], outputs=outputs, request_compression_algorithm=compression)
            assert result.as_numpy(f"{name}.logits").tobytes() == logits[name].numpy().tobytes()
            probabilities = task.probabilities(logits[name])
            assert result.as_numpy(f"{name}.probs").tobytes() == probabilities.numpy().tobytes()
            if name != "tags":
                labels = [task.labels[i] for i in probabilities.argmax(1)]
                texts = [text.decode() if binary else text for text in result.as_numpy(f"{name}.label")]
                assert texts == labels
            assert ("data" in result.get_output(f"{name}.logits")) is not binary
            single = triton.infer(name, [images], request_compression_algorithm=compression)
            assert single.as_numpy("logits").tobytes() == logits[name].numpy().tobytes()


def test_tritons_client_raises_with_the_servers_message(triton: InferenceServerClient) -> None:
    inputs = [images_of(pictures(1))]
    arguments_by_message: dict[str, Any] = {
        "Model 'cars' is not served. Served: 'combined', 'features', 'digits', 'strokes', 'tags'.": {
            "model_name": "cars"
        },
        "Version '7' of model 'digits' is not served. Served: version '1'.": {
            "model_name": "digits",
            "model_version": "7",
        },
        "has no output 'probabilities'": {"model_name": "digits", "outputs": [InferRequestedOutput("probabilities")]},
        "Output 'logits' uses classification, which is not supported": {
            "model_name": "digits",
            "outputs": [InferRequestedOutput("logits", class_count=2)],
        },
    }
    for message, arguments in arguments_by_message.items():
        with pytest.raises(InferenceServerException) as error:
            triton.infer(inputs=inputs, **arguments)
        assert message in error.value.message()
    with pytest.raises(InferenceServerException, match="'cars' is not served"):
        triton.get_model_metadata("cars")


def test_served_probabilities_are_those_of_the_command_line(
    served: ServedProcess, tasks: tuple[Path, dict[str, Task]], tmp_path: Path, run: Run
) -> None:
    files = pictures(4, seed=5)
    for number, file in enumerate(files):
        (tmp_path / f"{number}.png").write_bytes(file)
    printed = run("predict", *sorted(tmp_path.glob("*.png")), "--registry", tasks[0], "--device", "cpu", "--json")
    predictions = list(json.loads(printed.out)["images"].values())
    with client_at(served) as client:
        for number, file in enumerate(files):
            (probabilities,) = infer(client, [file], tasks="digits").as_numpy("digits.probs").tolist()
            labels = dict(zip(tasks[1]["digits"].labels, probabilities, strict=True))
            assert {row["label"]: row["probability"] for row in predictions[number]["digits"]} == labels
            (probabilities,) = infer(client, [file], tasks="tags").as_numpy("tags.probs").tolist()
            likely = {label: p for label, p in zip(tasks[1]["tags"].labels, probabilities, strict=True) if p >= 0.5}
            assert {row["label"]: row["probability"] for row in predictions[number]["tags"]} == likely


def test_a_disconnected_client_is_not_a_server_error(served: ServedProcess) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    head = (
        "POST /v2/models/combined/infer HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {}\r\nContent-Length: {}\r\n\r\n"
    )
    body, length = InferenceServerClient.generate_request_body([images_of(pictures(128))])
    head = head.replace("X-Req", f"{HEADER_LENGTH}: {length}\r\nX-Req")
    for name, missing in (("early", 1), ("late", 0)):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.format(name, len(body) + missing).encode() + body)

    def lines() -> list[Any]:
        written = served.log.read_text().splitlines()
        return [json.loads(line) for line in written if '"early"' in line or '"late"' in line]

    until(lambda: len(lines()) == 2, "both are logged")
    assert sorted((line["request_id"], line["status"]) for line in lines()) == [("early", 499), ("late", 499)]
    assert "Traceback" not in served.log.read_text()
    assert "traceback" not in served.log.read_text()


def _register_more(location: str) -> None:
    """Registers new tasks and new versions, one after another."""
    backbone = load_backbone("glyphs", device="cpu")
    with Registry.open(location, create=False) as registry:
        for seed, name in enumerate(["digits", "letters", "tags", "letters", "digits"], start=50):
            task = random_task(backbone, name, classes=5, seed=seed)
            registry.register(task, golden(backbone, task), new_version=True)
            time.sleep(0.5)


def test_responses_under_load_are_from_one_generation_and_bitwise_equal_to_single_predictions(
    glyphs: FrozenBackbone, tasks: tuple[Path, dict[str, Task]], tmp_path: Path, another_interpreter: None
) -> None:
    files, path, finished = pictures(20, seed=9), tmp_path / "tasks.db", threading.Event()
    with Registry.open(tasks[0]) as registry:
        registry.backup(path)

    def work(seed: int) -> list[tuple[list[int], set[str], InferResult]]:
        random, results = Random(seed), []
        with client_at(served) as client:
            while len(results) < 10 or not finished.is_set():
                indices = random.choices(range(len(files)), k=random.choice([1, 1, 2, 5, 9, 33]))
                names = random.choice([(), ("digits",), ("tags", "strokes"), ("strokes", "digits", "tags")])
                parameters = {"tasks": ",".join(names)} if names else {}
                results.append((indices, set(names), infer(client, [files[i] for i in indices], **parameters)))
        return results

    with ServedProcess(path, tmp_path, "--max-waiting", 1000) as served, ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(work, seed) for seed in range(16)]
        try:
            assert exit_code(_register_more, str(path), timeout_s=120) == 0
        finally:
            finished.set()
        results = [result for future in futures for result in future.result()]

    with Registry.open(path) as registry:
        records = [registry.record(event.subject) for event in registry.events() if event.kind == "registered"]
        expected = {record.sha256: alone(glyphs, registry.get(record.ref), files) for record in records}
    generations = set()
    for indices, names, result in results:
        response = result.get_response()
        generation = response["parameters"]["generation"]
        assert response["model_version"] == str(generation)
        current = {record.name: record for record in records if record.generation <= generation}
        described = {(output["parameters"]["task"], output["parameters"]["sha256"]) for output in response["outputs"]}
        assert described == {(r.ref, r.sha256) for r in current.values() if not names or r.name in names}
        for ref, sha256 in described:
            logits = result.as_numpy(f"{ref.split(':')[0]}.logits")
            assert [row.tobytes() for row in logits] == [expected[sha256][i] for i in indices]
        generations.add(generation)
    assert len(results) >= 160
    assert len(generations) >= 4, "too few registrations during the load to prove anything"
