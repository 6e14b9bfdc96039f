"""Requests and answers of the Open Inference Protocol, without a server."""

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
from addenda.serving.tensors import MOST_LISTS, MOST_VALUES, Output, encode, parse

FLOATS = arrays.arrays(np.float32, arrays.array_shapes(max_dims=4, max_side=4), elements=st.floats(width=32))
FINITE = arrays.arrays(
    np.float32,
    arrays.array_shapes(max_dims=3, max_side=4),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
STRINGS = st.lists(st.binary(max_size=20), max_size=5)
PIXEL: dict[str, Any] = {"name": "p", "shape": [1], "datatype": "FP32", "data": [0.5]}


def body(*inputs: dict[str, Any], binary: bytes = b"", **members: Any) -> tuple[bytes, str | None]:
    """A request, and what its header says of the JSON's length where something follows it."""
    text = json.dumps({"inputs": inputs, **members}).encode()
    return text + binary, str(len(text)) if binary else None


def changed(**members: Any) -> tuple[bytes, str | None]:
    return body({**PIXEL, **members})


def prefixed(strings: list[bytes]) -> bytes:
    return b"".join(len(one).to_bytes(4, "little") + one for one in strings)


@given(FLOATS, STRINGS)
def test_binary_tensors_are_read_as_they_were_written(floats: np.ndarray, strings: list[bytes]) -> None:
    pieces = [floats.tobytes(), prefixed(strings)]
    said = [{"parameters": {"binary_data_size": len(piece)}} for piece in pieces]
    asked = parse(
        *body(
            {"name": "p", "shape": floats.shape, "datatype": "FP32", **said[0]},
            {"name": "s", "shape": [len(strings)], "datatype": "BYTES", **said[1]},
            binary=b"".join(pieces),
        )
    )
    assert asked.tensors["p"].tobytes() == pieces[0]
    assert asked.tensors["p"].shape == floats.shape
    assert list(asked.tensors["s"]) == strings


@given(FINITE, STRINGS, st.booleans(), st.text(max_size=5))
def test_json_tensors_are_read_as_they_were_written(
    floats: np.ndarray, strings: list[bytes], nested: bool, name: str
) -> None:
    data = (floats if nested else floats.ravel()).tolist()
    asked = parse(
        *body(
            {"name": "p", "shape": floats.shape, "datatype": "FP32", "data": data},
            {"name": "s", "shape": [len(strings), 1], "datatype": "BYTES",
             "data": [base64.b64encode(one).decode() for one in strings]},
            id=name,
        )
    )  # fmt: skip
    assert asked.tensors["p"].tobytes() == floats.tobytes()
    assert asked.tensors["p"].shape == floats.shape
    assert asked.tensors["s"].ravel().tolist() == strings
    assert asked.id == name


def test_outputs_are_wanted_as_the_request_says_unless_they_say_otherwise() -> None:
    outputs = [{"name": "a"}, {"name": "b", "parameters": {"binary_data": False}}]
    asked = parse(*body(PIXEL, outputs=outputs, parameters={"binary_data_output": True}))
    assert (asked.outputs, asked.binary) == ({"a": True, "b": False}, True)
    asked = parse(*body(PIXEL, outputs=[{"name": "a"}, {"name": "b", "parameters": {"binary_data": True}}]))
    assert (asked.outputs, asked.binary) == ({"a": False, "b": True}, False)


@given(FINITE, st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), min_size=1, max_size=4),
       st.booleans(), st.booleans())  # fmt: skip
def test_tritons_client_reads_what_is_written(floats: np.ndarray, texts: list[str], one: bool, other: bool) -> None:
    from tritonclient.http import InferResult

    outputs = [
        Output("logits", floats, {"task": "digits:1"}, one),
        Output("label", np.array(texts, dtype=object), {}, other),
    ]
    written, header_length = encode({"id": "7", "parameters": {"generation": 3}}, outputs)
    assert (header_length is None) == (not one and not other)
    found = InferResult.from_response_body(written, header_length=header_length)
    assert found.as_numpy("logits").tobytes() == floats.tobytes()
    assert found.as_numpy("logits").shape == floats.shape
    assert found.as_numpy("label").tolist() == ([text.encode() for text in texts] if other else texts)
    assert found.get_response()["parameters"] == {"generation": 3}
    assert found.get_output("logits")["parameters"]["task"] == "digits:1"


MALFORMED = {
    "": "The request is not JSON: EOF while parsing a value",
    "[": "The request is not JSON",
    "[]": "The request: Input should be a valid dictionary",
    "{}": "inputs: Field required",
    '{"inputs": {}}': "inputs: Input should be a valid list",
    '{"inputs": [1, 2]}': "inputs.0: Input should be a valid dictionary",
    '{"inputs": [], "id": 7}': "id: Input should be a valid string; found 7",
    '{"inputs": [], "id": "\\ud800"}': "The request is not JSON",
    "[" * 100_000: "recursion limit exceeded",
    "[" * (MOST_LISTS + 1): f"{MOST_LISTS} lists. Send tensors in binary",
    "," * (MOST_VALUES + 1): f"more than {MOST_VALUES} values",
    '{"inputs": [' + "9" * 5000 + "]}": "number out of range",
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), MALFORMED.items(), ids=range(len(MALFORMED)))
def test_what_is_no_request_is_refused(text: str, said: str) -> None:
    with pytest.raises(DataError) as error:
        parse(text.encode())
    assert said in str(error.value)
    assert len(str(error.value)) < 500


REFUSED: dict[str, tuple[bytes, str | None]] = {
    "inputs.0.shape.0: Input should be greater than or equal to 0; found -1": changed(shape=[-1]),
    "inputs.0.shape.0: Input should be less than or equal to 2147483648": changed(shape=[10**30]),
    "inputs.0.shape.0: Input should be a valid integer; found True": changed(shape=[True]),
    "inputs.0.shape.0: Input should be a valid integer; found 1.0": changed(shape=[1.0]),
    "inputs.0.shape: List should have at most 8 items": changed(shape=[1] * 9),
    "which is 4611686018427387904 values; its data is 1.": changed(shape=[2**31, 2**31]),
    "cannot be read as FP32: int too large to convert to float": changed(data=[10**400]),
    "shape [0], which is 0 values; its data is 1.": changed(shape=[0]),
    "Input 'p' has the shape [2], which is 2 values; its data is 1.": changed(shape=[2]),
    "The data of Input 'p' is not nested as its shape [2, 2] says.": changed(shape=[2, 2], data=[[1, 2], [3]]),
    "not nested as its shape [2, 1] says.": changed(shape=[2, 1], data=[[1], 2]),
    "values of list; taken are FP32": changed(data=[[1]]),
    "values of str; taken are FP32 with numbers": changed(data=["0.5"]),
    "values of bool; taken": changed(data=[True]),
    "values of NoneType; taken": changed(data=[None]),
    "values of float, str; taken": changed(shape=[2], data=[0.5, "x" * 10**6]),
    "the datatype 'INT64' and values of float": changed(datatype="INT64"),
    "the datatype 'BYTES' and values of float": changed(datatype="BYTES"),
    "cannot be read as BYTES: Incorrect padding": changed(datatype="BYTES", data=["abc"]),
    "cannot be read as BYTES: string argument should contain only ASCII": changed(datatype="BYTES", data=["é"]),
    "has no list of data, and no binary_data_size": changed(data="abcd"),
    "Input 'p' is there twice": body(PIXEL, PIXEL),
    "asks for shared_memory_region, which is not offered": changed(parameters={"shared_memory_region": "x"}),
    "Output 'o' asks for classification": body(
        PIXEL, outputs=[{"name": "o", "parameters": {"classification": 3}}]
    ),
    "Output 'o' is asked for twice": body(PIXEL, outputs=[{"name": "o"}, {"name": "o"}]),
    "Output 'o' has binary_data 1; it is true or false": body(
        PIXEL, outputs=[{"name": "o", "parameters": {"binary_data": 1}}]
    ),
    "The request has binary_data_output 'yes'": body(PIXEL, parameters={"binary_data_output": "yes"}),
    "has binary_data_size 4; 0 bytes are there behind the JSON": changed(parameters={"binary_data_size": 4}),
    "has binary_data_size -4; ": body({**PIXEL, "parameters": {"binary_data_size": -4}}, binary=b"1234"),
    "has binary_data_size True; ": body({**PIXEL, "parameters": {"binary_data_size": True}}, binary=b"1234"),
    "which is 1 values; its data is 0.75": body({**PIXEL, "parameters": {"binary_data_size": 3}}, binary=b"123"),
    "4 bytes more than its inputs' binary_data_size say": body(PIXEL, binary=b"1234"),
    "the datatype 'INT8'; taken are": body(
        {**PIXEL, "datatype": "INT8", "parameters": {"binary_data_size": 1}}, binary=b"1"
    ),
    "String 0 of Input 'p' goes beyond its 5 bytes that are left": body(
        {**PIXEL, "datatype": "BYTES", "parameters": {"binary_data_size": 5}}, binary=b"\2\0\0\0a"
    ),
    "String 1 of Input 'p' goes beyond its 3 bytes": body(
        {**PIXEL, "datatype": "BYTES", "parameters": {"binary_data_size": 8}}, binary=b"\1\0\0\0a\0\0\0"
    ),
    "is '-1', not a number of bytes": (b"{}", "-1"),
    "is '٣', not a number of bytes": (b"{}", "٣"),
    "is 3, but the body has 2 bytes": (b"{}", "3"),
}  # fmt: skip


@pytest.mark.parametrize(("request_", "said"), [(one, said) for said, one in REFUSED.items()], ids=range(len(REFUSED)))
def test_a_request_that_does_not_hold_together_is_told_why(request_: tuple[bytes, str | None], said: str) -> None:
    with pytest.raises(DataError) as error:
        parse(*request_)
    assert said in str(error.value)
    assert len(str(error.value)) < 500


GOOD, GOOD_LENGTH = body({**PIXEL, "parameters": {"binary_data_size": 4}}, binary=b"1234")


@given(
    st.integers(0, len(GOOD) - 1), st.binary(max_size=3), st.integers(0, 3), st.sampled_from([GOOD_LENGTH, None, "5"])
)
def test_whatever_is_changed_in_a_request_it_is_read_or_refused(
    at: int, put: bytes, cut: int, header_length: str | None
) -> None:
    try:
        asked = parse(GOOD[:at] + put + GOOD[at + cut :], header_length)
    except DataError:
        return
    assert all(tensor.dtype in (np.float32, object) for tensor in asked.tensors.values())
