"""Requests and answers of the Open Inference Protocol: in JSON, or with tensors in binary behind it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from addenda.exceptions import DataError

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header that gives the JSON's length in bytes where binary tensors follow it."""
MOST_VALUES = 2**22
MOST_LISTS = 2**18
"""Values, and lists or objects, of one JSON document: as Python objects they are far larger than as text."""

Parameters = dict[str, Any]
Values = np.ndarray[Any, Any]
"""Of a tensor: float32, or as objects the bytes of an input and the strings of an output."""


class _Named(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    parameters: Parameters = {}


class _Input(_Named):
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=8), FailFast()]
    datatype: str
    data: Any = None


class _Request(BaseModel):
    model_config = ConfigDict(strict=True)
    inputs: Annotated[list[_Input], FailFast()]
    outputs: Annotated[list[_Named], FailFast()] = []
    parameters: Parameters = {}
    id: str = ""


@dataclass(frozen=True, eq=False)
class Request:
    """What a client asks."""

    id: str  # its own, for the answer to repeat
    tensors: dict[str, Values]  # the inputs by name, each of the shape that was said
    outputs: dict[str, bool]  # those asked for, in order, and whether each is wanted in binary; none asks for all
    binary: bool  # whether the outputs are wanted in binary where none is named
    parameters: Parameters


@dataclass(frozen=True, eq=False)
class Output:
    """An output of an answer, what is said about it, and whether it goes in binary."""

    name: str
    values: Values
    parameters: Mapping[str, str | int | bool]
    binary: bool


def parse(body: bytes, header_length: str | None = None) -> Request:
    """Reads a request. Strings of an input in JSON are base64, since JSON holds no bytes.

    Source: KServe, Open Inference Protocol v2; Triton, binary tensor data extension. FP32 and BYTES are all that the
    served models take.
    """
    size = _length(header_length, len(body))
    if body.count(b",", 0, size) > MOST_VALUES or body.count(b"[", 0, size) + body.count(b"{", 0, size) > MOST_LISTS:
        raise DataError(
            f"The request's JSON has more than {MOST_VALUES} values or {MOST_LISTS} lists. Send tensors in binary."
        )
    try:
        asked = _Request.model_validate(from_json(body[:size]))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        at = ".".join(map(str, fault["loc"])) or "The request"
        raise DataError(f"{at}: {fault['msg']}; found {short(fault['input'])}.") from error
    except ValueError as error:
        raise DataError(f"The request is not JSON: {error}.") from error
    tensors: dict[str, Values] = {}
    rest = memoryview(body)[size:]
    for one in asked.inputs:
        called = f"Input {short(one.name)}"
        if one.name in tensors:
            raise DataError(f"{called} is there twice.")
        _refuse(called, one.parameters)
        num_bytes = one.parameters.get("binary_data_size")
        if num_bytes is None:
            tensors[one.name] = _from_json(called, one)
            continue
        if type(num_bytes) is not int or not 0 <= num_bytes <= len(rest):
            raise DataError(
                f"{called} has binary_data_size {short(num_bytes)}; {len(rest)} bytes are there behind the JSON, whose "
                f"length the header {HEADER_LENGTH} gives."
            )
        tensors[one.name] = _from_binary(called, one, rest[:num_bytes])
        rest = rest[num_bytes:]
    if rest:
        raise DataError(f"The request has {len(rest)} bytes more than its inputs' binary_data_size say.")
    binary = _flag("The request", asked.parameters, "binary_data_output", False)
    outputs: dict[str, bool] = {}
    for wanted in asked.outputs:
        called = f"Output {short(wanted.name)}"
        if wanted.name in outputs:
            raise DataError(f"{called} is asked for twice.")
        _refuse(called, wanted.parameters)
        outputs[wanted.name] = _flag(called, wanted.parameters, "binary_data", binary)
    return Request(asked.id, tensors, outputs, binary, asked.parameters)


def encode(answer: Mapping[str, Any], outputs: Sequence[Output]) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where binary tensors follow it.

    Numbers in JSON read back to the same bits of float32.
    """
    described, pieces = [], []
    for output in outputs:
        datatype = "FP32" if output.values.dtype == np.float32 else "BYTES"
        one = {"name": output.name, "datatype": datatype, "shape": output.values.shape, "parameters": output.parameters}
        if output.binary:
            pieces.append(_in_binary(output.values))
            one["parameters"] = {**output.parameters, "binary_data_size": len(pieces[-1])}
        else:
            one["data"] = output.values.ravel().tolist()  # each a float64 of the same value, which JSON gives in full
        described.append(one)
    head = json.dumps({**answer, "outputs": described}, allow_nan=False).encode()
    return b"".join([head, *pieces]), len(head) if pieces else None


def _in_binary(values: Values) -> bytes:
    if values.dtype == np.float32:
        return values.astype("<f4").tobytes()
    strings = [text.encode() for text in values.flat]
    return b"".join(len(text).to_bytes(4, "little") + text for text in strings)


def _length(header_length: str | None, available: int) -> int:
    """The length of the JSON at the start of a body."""
    if header_length is None:
        return available
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12):
        raise DataError(f"{HEADER_LENGTH} is {short(header_length)}, not a number of bytes.")
    if int(header_length) > available:
        raise DataError(f"{HEADER_LENGTH} is {header_length}, but the body has {available} bytes.")
    return int(header_length)


def _flag(called: str, parameters: Parameters, name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise DataError(f"{called} has {name} {short(value)}; it is true or false.")
    return value


def _refuse(called: str, parameters: Parameters) -> None:
    """Refuses the protocol's extensions without which the client would misread the answer."""
    for name in ("shared_memory_region", "classification"):
        if name in parameters:
            raise DataError(f"{called} asks for {name}, which is not offered. Send and take the tensor itself.")


def _from_json(called: str, asked: _Input) -> Values:
    """A tensor whose values stand in the JSON, flat or nested as its shape says."""
    values = asked.data
    if not isinstance(values, list):
        raise DataError(f"{called} has no list of data, and no binary_data_size.")
    nested = bool(values) and isinstance(values[0], list)
    for size in asked.shape[1:] if nested else ():
        if any(type(part) is not list or len(part) != size for part in values):
            raise DataError(f"The data of {called} is not nested as its shape {asked.shape} says.")
        values = [value for part in values for value in part]
    _check_count(called, asked, len(values))
    kinds = set(map(type, values))
    try:
        if asked.datatype == "BYTES" and kinds <= {str}:
            return np.array([base64.b64decode(text, validate=True) for text in values], object).reshape(asked.shape)
        if asked.datatype == "FP32" and kinds <= {int, float}:
            with np.errstate(over="ignore"):  # infinite then, which is for the reader to refuse
                return np.array(values, np.float64).astype(np.float32).reshape(asked.shape)
    except (ValueError, OverflowError) as error:
        raise DataError(f"The data of {called} cannot be read as {asked.datatype}: {error}.") from error
    found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
    raise DataError(
        f"{called} has the datatype {short(asked.datatype)} and values of {found}; taken are FP32 with numbers and "
        "BYTES with base64 strings."
    )


def _from_binary(called: str, asked: _Input, raw: memoryview) -> Values:
    """A tensor behind the JSON: float32 in little endian, or strings that each follow their length in four bytes."""
    if asked.datatype == "FP32":
        _check_count(called, asked, len(raw) / 4)
        return np.frombuffer(raw, "<f4").reshape(asked.shape)
    if asked.datatype != "BYTES":
        raise DataError(f"{called} has the datatype {short(asked.datatype)}; taken are FP32 and BYTES.")
    strings: list[bytes] = []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        if len(raw) < 4 + size:
            raise DataError(f"String {len(strings)} of {called} goes beyond its {len(raw)} bytes that are left.")
        strings.append(raw[4 : 4 + size].tobytes())
        raw = raw[4 + size :]
    _check_count(called, asked, len(strings))
    return np.array(strings, object).reshape(asked.shape)


def _check_count(called: str, asked: _Input, found: float) -> None:
    expected = math.prod(asked.shape)
    if found != expected:
        raise DataError(f"{called} has the shape {asked.shape}, which is {expected} values; its data is {found:g}.")
