"""Features over HTTP: the REST API and the model `features` of the Open Inference Protocol."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image

from addenda import CombinedModel, FrozenBackbone, Registry, Task
from tests.serving.test_api import picture, problem
from tests.support.places import ROOT
from tests.support.servers import AppClient, client_of

EMBED = "/api/v1/embed"


@pytest.mark.slow
def test_the_example_of_the_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    match = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    assert match is not None
    exec(compile(match[1], "serving.md", "exec"), {})
    assert capsys.readouterr().out == match[2]


@pytest.fixture
def client(tiny: FrozenBackbone, registry: Registry, registered: Callable[..., Task]) -> Iterator[AppClient]:
    registered("digits")
    registered("strokes", seed=5)
    with client_of(tiny, registry) as opened:
        yield opened


def expected(client: AppClient, tiny: FrozenBackbone, image: bytes, *names: str) -> dict[str, torch.Tensor]:
    model = CombinedModel(tiny, list(client.app.state.service.snapshot.model.tasks.values()))
    return model.embed(tiny.transform(Image.open(BytesIO(image)))[None], names)


def test_features_over_http_have_the_bits_of_the_model(client: AppClient, tiny: FrozenBackbone) -> None:
    image = picture()
    names = ("task:digits", "pooled", "layers")
    answer = client.post(f"{EMBED}?features={','.join(names)}", content=image).json()
    status = client.get("/api/v1/status").json()
    for key in ("generation", "backbone_fingerprint", "numerics_fingerprint"):
        assert answer[key] == status[key]
    assert answer["exact"] is True
    assert tuple(answer["features"]) == names
    for name, values in expected(client, tiny, image, *names).items():
        received = torch.tensor(answer["features"][name]["values"], dtype=torch.float32)
        assert received.numpy().tobytes() == values[0].numpy().tobytes()
    digits = client.app.state.service.snapshot.model.tasks["digits"]
    entry = answer["features"]["task:digits"]
    assert (entry["ref"], entry["sha256"]) == (digits.ref, digits.sha256)
    assert answer["features"]["pooled"].keys() == {"values"}
    assert list(client.post(EMBED, files={"image": image}).json()["features"]) == ["pooled"]


def test_a_request_for_unknown_features_is_refused(client: AppClient) -> None:
    problem(client.post(f"{EMBED}?features=final", content=picture()), 400, "There is no feature 'final'")
    problem(client.post(f"{EMBED}?features=task:cars", content=picture()), 404, "Task 'cars' is not served")
    problem(client.post(EMBED, content=b"GIF89a"), 400, "not a JPEG, PNG or WEBP file")


def test_the_model_of_features_returns_them_by_name(client: AppClient, tiny: FrozenBackbone) -> None:
    def infer(**members: Any) -> dict[str, Any]:
        data = [base64.b64encode(image).decode() for image in images]
        inputs = [{"name": "image", "datatype": "BYTES", "shape": [2], "data": data}]
        response = client.post("/v2/models/features/infer", json={"inputs": inputs, **members})
        assert response.status_code == 200, response.text
        return {output["name"]: output for output in json.loads(response.content)["outputs"]}

    images = [picture(1), picture(2)]
    outputs = infer()
    assert list(outputs) == ["pooled", "layers", "task:digits", "task:strokes"]
    listed = client.get("/v2/models/features").json()["outputs"]
    for number, image in enumerate(images):
        for name, values in expected(client, tiny, image, *outputs).items():
            width = values.shape[1]
            assert outputs[name]["shape"] == [2, width]
            assert {"name": name, "datatype": "FP32", "shape": [-1, width]} in listed
            received = torch.tensor(outputs[name]["data"]).reshape(2, width)[number]
            assert received.numpy().tobytes() == values[0].numpy().tobytes()
    assert outputs["task:digits"]["parameters"]["task"] == "digits:1"
    assert list(infer(parameters={"tasks": "str*"})) == ["pooled", "layers", "task:strokes"]
    assert list(infer(outputs=[{"name": "task:digits"}])) == ["task:digits"]
