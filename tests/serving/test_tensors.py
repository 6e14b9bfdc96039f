"""Parsing requests and encoding responses of the Open Inference Protocol, without a server."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from addenda.exceptions import DataError
from addenda.serving.tensors import MAX_LISTS, MAX_VALUES, Output, encode, parse

FLOATS = arrays.arrays(np.float32, arrays.array_shapes(max_dims=4, max_side=4), elements=st.floats(width=32))
FINITE = arrays.arrays(
    np.float32,
    arrays.array_shapes(max_dims=3, max_side=4),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
STRINGS = st.lists(st.binary(max_size=20), max_size=5)
PIXEL: dict[str, Any] = {"name": "p", "shape": [1], "datatype": "FP32", "data": [0.5]}


def body(*inputs: dict[str, Any], binary: bytes = b"", **members: Any) -> tuple[bytes, str | None]:
    """A request, and the header with the length of its JSON if binary data follow it."""
    text = json.dumps({"inputs": inputs, **members}).encode()
    return text + binary, str(len(text)) if binary else None


def changed(**members: Any) -> tuple[bytes, str | None]:
    return body({**PIXEL, **members})


def prefixed(strings: list[bytes]) -> bytes:
    return b"".join(len(string).to_bytes(4, "little") + string for string in strings)


@given(FLOATS, STRINGS)
def test_binary_tensors_are_parsed_exactly(floats: np.ndarray, strings: list[bytes]) -> None:
    chunks = [floats.tobytes(), prefixed(strings)]
    sizes = [{"parameters": {"binary_data_size": len(chunk)}} for chunk in chunks]
    request = parse(
        *body(
            {"name": "p", "shape": floats.shape, "datatype": "FP32", **sizes[0]},
            {"name": "s", "shape": [len(strings)], "datatype": "BYTES", **sizes[1]},
            binary=b"".join(chunks),
        )
    )
    assert request.tensors["p"].tobytes() == chunks[0]
    assert request.tensors["p"].shape == floats.shape
    assert list(request.tensors["s"]) == strings


@pytest.mark.slow
@given(FINITE, STRINGS, st.booleans(), st.text(max_size=5))
def test_json_tensors_are_parsed_exactly(floats: np.ndarray, strings: list[bytes], nested: bool, name: str) -> None:
    data = (floats if nested else floats.ravel()).tolist()
    request = parse(
        *body(
            {"name": "p", "shape": floats.shape, "datatype": "FP32", "data": data},
            {"name": "s", "shape": [len(strings), 1], "datatype": "BYTES",
             "data": [base64.b64encode(string).decode() for string in strings]},
            id=name,
        )
    )  # fmt: skip
    assert request.tensors["p"].tobytes() == floats.tobytes()
    assert request.tensors["p"].shape == floats.shape
    assert request.tensors["s"].ravel().tolist() == strings
    assert request.id == name


def test_binary_data_output_is_the_default_of_each_output() -> None:
    outputs = [{"name": "a"}, {"name": "b", "parameters": {"binary_data": False}}]
    request = parse(*body(PIXEL, outputs=outputs, parameters={"binary_data_output": True}))
    assert (request.outputs, request.binary) == ({"a": True, "b": False}, True)
    request = parse(*body(PIXEL, outputs=[{"name": "a"}, {"name": "b", "parameters": {"binary_data": True}}]))
    assert (request.outputs, request.binary) == ({"a": False, "b": True}, False)


@given(FINITE, st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), min_size=1, max_size=4),
       st.booleans(), st.booleans())  # fmt: skip
def test_tritons_client_parses_encoded_responses(
    floats: np.ndarray, texts: list[str], logits_binary: bool, labels_binary: bool
) -> None:
    from tritonclient.http import InferResult

    outputs = [
        Output("logits", floats, {"task": "digits:1"}, logits_binary),
        Output("label", np.array(texts, dtype=object), {}, labels_binary),
    ]
    encoded, header_length = encode({"id": "7", "parameters": {"generation": 3}}, outputs)
    assert (header_length is None) == (not logits_binary and not labels_binary)
    result = InferResult.from_response_body(encoded, header_length=header_length)
    assert result.as_numpy("logits").tobytes() == floats.tobytes()
    assert result.as_numpy("logits").shape == floats.shape
    assert result.as_numpy("label").tolist() == ([text.encode() for text in texts] if labels_binary else texts)
    assert result.get_response()["parameters"] == {"generation": 3}
    assert result.get_output("logits")["parameters"]["task"] == "digits:1"


MALFORMED = {
    "": "The request is not valid JSON: EOF while parsing a value",
    "[": "The request is not valid JSON",
    "[]": "The request: Input should be a valid dictionary",
    "{}": "inputs: Field required",
    '{"inputs": {}}': "inputs: Input should be a valid list",
    '{"inputs": [1, 2]}': "inputs.0: Input should be a valid dictionary",
    '{"inputs": [], "id": 7}': "id: Input should be a valid string; found 7",
    '{"inputs": [], "id": "\\ud800"}': "The request is not valid JSON",
    "[" * 100_000: "recursion limit exceeded",
    "[" * (MAX_LISTS + 1): f"{MAX_LISTS} lists. Send tensors in binary",
    "," * (MAX_VALUES + 1): f"more than {MAX_VALUES} values",
    '{"inputs": [' + "9" * 5000 + "]}": "number out of range",
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MALFORMED.items(), ids=range(len(MALFORMED)))
def test_a_malformed_request_is_rejected(text: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        parse(text.encode())
    assert message in str(error.value)
    assert len(str(error.value)) < 500


INVALID: dict[str, tuple[bytes, str | None]] = {
    "inputs.0.shape.0: Input should be greater than or equal to 0; found -1": changed(shape=[-1]),
    "inputs.0.shape.0: Input should be less than or equal to 2147483648": changed(shape=[10**30]),
    "inputs.0.shape.0: Input should be a valid integer; found True": changed(shape=[True]),
    "inputs.0.shape.0: Input should be a valid integer; found 1.0": changed(shape=[1.0]),
    "inputs.0.shape: List should have at most 8 items": changed(shape=[1] * 9),
    "which is 4611686018427387904 values; its data has 1.": changed(shape=[2**31, 2**31]),
    "cannot be read as FP32: int too large to convert to float": changed(data=[10**400]),
    "shape [0], which is 0 values; its data has 1.": changed(shape=[0]),
    "Input 'p' has shape [2], which is 2 values; its data has 1.": changed(shape=[2]),
    "The data of Input 'p' is not nested according to its shape [2, 2].": changed(shape=[2, 2], data=[[1, 2], [3]]),
    "not nested according to its shape [2, 1].": changed(shape=[2, 1], data=[[1], 2]),
    "values of type list. Supported: FP32": changed(data=[[1]]),
    "values of type str. Supported: FP32 with numbers": changed(data=["0.5"]),
    "values of type bool. Supported": changed(data=[True]),
    "values of type NoneType. Supported": changed(data=[None]),
    "values of type float, str. Supported": changed(shape=[2], data=[0.5, "x" * 10**6]),
    "datatype 'INT64' and values of type float": changed(datatype="INT64"),
    "datatype 'BYTES' and values of type float": changed(datatype="BYTES"),
    "cannot be read as BYTES: Incorrect padding": changed(datatype="BYTES", data=["abc"]),
    "cannot be read as BYTES: string argument should contain only ASCII": changed(datatype="BYTES", data=["é"]),
    "has neither a list as data nor a binary_data_size": changed(data="abcd"),
    "Input 'p' is given twice": body(PIXEL, PIXEL),
    "uses shared_memory_region, which is not supported": changed(parameters={"shared_memory_region": "x"}),
    "Output 'o' uses classification": body(
        PIXEL, outputs=[{"name": "o", "parameters": {"classification": 3}}]
    ),
    "Output 'o' is requested twice": body(PIXEL, outputs=[{"name": "o"}, {"name": "o"}]),
    "Output 'o' has binary_data 1; it must be true or false": body(
        PIXEL, outputs=[{"name": "o", "parameters": {"binary_data": 1}}]
    ),
    "The request has binary_data_output 'yes'": body(PIXEL, parameters={"binary_data_output": "yes"}),
    "has binary_data_size 4, but 0 bytes follow the JSON": changed(parameters={"binary_data_size": 4}),
    "has binary_data_size -4, ": body({**PIXEL, "parameters": {"binary_data_size": -4}}, binary=b"1234"),
    "has binary_data_size True, ": body({**PIXEL, "parameters": {"binary_data_size": True}}, binary=b"1234"),
    "which is 1 values; its data has 0.75": body({**PIXEL, "parameters": {"binary_data_size": 3}}, binary=b"123"),
    "4 bytes beyond the binary_data_size of its inputs": body(PIXEL, binary=b"1234"),
    "datatype 'INT8'. Supported: ": body(
        {**PIXEL, "datatype": "INT8", "parameters": {"binary_data_size": 1}}, binary=b"1"
    ),
    "String 0 of Input 'p' is longer than the 5 bytes left; prefix each string with its length": body(
        {**PIXEL, "datatype": "BYTES", "parameters": {"binary_data_size": 5}}, binary=b"\2\0\0\0a"
    ),
    "String 1 of Input 'p' is longer than the 3 bytes left; prefix each string with its length": body(
        {**PIXEL, "datatype": "BYTES", "parameters": {"binary_data_size": 8}}, binary=b"\1\0\0\0a\0\0\0"
    ),
    "is '-1', not a number of bytes": (b"{}", "-1"),
    "is '٣', not a number of bytes": (b"{}", "٣"),
    "is 3, but the body has 2 bytes": (b"{}", "3"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "message"), [(request_, message) for message, request_ in INVALID.items()], ids=range(len(INVALID))
)
def test_an_invalid_request_is_rejected_with_the_reason(request_: tuple[bytes, str | None], message: str) -> None:
    with pytest.raises(DataError) as error:
        parse(*request_)
    assert message in str(error.value)
    assert len(str(error.value)) < 500


GOOD, GOOD_LENGTH = body({**PIXEL, "parameters": {"binary_data_size": 4}}, binary=b"1234")


@given(
    st.integers(0, len(GOOD) - 1), st.binary(max_size=3), st.integers(0, 3), st.sampled_from([GOOD_LENGTH, None, "5"])
)
def test_any_changed_request_is_parsed_or_rejected(
    at: int, inserted: bytes, num_removed: int, header_length: str | None
) -> None:
    try:
        request = parse(GOOD[:at] + inserted + GOOD[at + num_removed :], header_length)
    except DataError:
        return
    assert all(tensor.dtype in (np.float32, object) for tensor in request.tensors.values())
